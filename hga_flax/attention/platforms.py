"""One function in several forms, of which the platform that a program is compiled for takes its own."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def by_platform(default: Callable[..., Any], *arrays: jax.Array, **forms: Callable[..., Any]) -> Any:
    """Returns `default(*arrays)`, or the form of the platform for which the program is compiled.

    All forms compute the same up to rounding; each one's gradient is its own. `lax.platform_dependent` alone would
    keep for the backward pass what any of the forms needs.

    Example: `by_platform(plain, x, kernel, cpu=product)`.

    Args:
        default: the form of the platforms that are not named.
        *arrays: what every form is called with; all are differentiated.
        **forms: by platform: "cpu", "cuda", "rocm", "tpu".
    """

    @jax.custom_vjp
    def compute(*arrays: jax.Array) -> Any:
        return lax.platform_dependent(*arrays, default=default, **forms)

    def forward(*arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        return compute(*arrays), arrays

    def backward(saved: tuple[jax.Array, ...], gradient: Any) -> tuple[jax.Array, ...]:
        of = lambda form: lambda arrays, gradient: jax.vjp(form, *arrays)[1](gradient)
        gradients = {platform: of(form) for platform, form in forms.items()}
        return lax.platform_dependent(saved, gradient, default=of(default), **gradients)

    compute.defvjp(forward, backward)
    return compute(*_varying_alike(arrays))


def on_gpus(form: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Returns a form under the names of the GPUs' platforms: `by_platform(plain, x, **on_gpus(form))`."""
    return {"cuda": form, "rocm": form}


def _varying_alike(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Marks what is the same on all devices as each one's own where another array is.

    Within `jax.shard_map` the gradient of such an array is then summed over the devices outside of the form.
    """

    def varying(array: jax.Array) -> frozenset[str]:
        # No default for an attribute that JAX renames: without the mark nothing fails, but more is summed.
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*map(varying, arrays))
    missing = [tuple(axes - varying(array)) for array in arrays]
    return tuple(
        lax.pcast(array, more, to="varying") if more else array for array, more in zip(arrays, missing, strict=True)
    )
