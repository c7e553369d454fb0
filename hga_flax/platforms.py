"""Functions with platform-specific implementations, selected by the platform that a program is compiled for."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType

# The platform of all programs that are traced in a context; "" if it is not known. Part of the keys of JAX's caches.
_platform = jax.make_user_context("")


@contextlib.contextmanager
def programs_for(device: jax.Device) -> Iterator[None]:
    """Context for tracing programs that only this kind of device will run; other kinds' implementations are left out.

    It saves a third of the time to trace and lower a training step. The results are the same.

    Example: `with programs_for(jax.devices()[0]): step.lower(state, batch)`.

    Args:
        device: CPU or TPU. For others nothing changes: JAX calls CUDA's and ROCm's devices both "gpu".
    """
    with _platform(device.platform if device.platform in ("cpu", "tpu") else ""):
        yield


def platform_dependent(*arrays: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """`lax.platform_dependent`, which in `programs_for` traces one implementation only."""
    if platform := _platform.value:
        return forms.get(platform, default)(*arrays)
    return lax.platform_dependent(*arrays, default=default, **forms)


def by_platform(default: Callable[..., Any], *arrays: jax.Array, **forms: Callable[..., Any]) -> Any:
    """Calls the implementation for the platform that the program is compiled for, or `default`.

    All implementations must compute the same result up to rounding; each is differentiated separately.
    `lax.platform_dependent` alone would save the residuals of every implementation for the backward pass.
    Arrays on a mesh with explicit axes take `default` on every platform.

    Example: `by_platform(plain, x, kernel, cpu=product)`.

    Args:
        default: implementation for platforms that are not named.
        *arrays: arguments of every implementation; all are differentiated.
        **forms: implementations by platform: "cpu", "cuda", "rocm", "tpu".
    """

    @jax.custom_vjp
    def compute(*arrays: jax.Array) -> Any:
        return platform_dependent(*arrays, default=default, **forms)

    def forward(*arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        return compute(*arrays), arrays

    def backward(saved: tuple[jax.Array, ...], gradient: Any) -> tuple[jax.Array, ...]:
        # Cached, since JAX traces one function that is named for several platforms (`on_gpus`) once.
        of = functools.cache(lambda form: lambda arrays, gradient: jax.vjp(form, *arrays)[1](gradient))
        gradients = {platform: of(form) for platform, form in forms.items()}
        return platform_dependent(saved, gradient, default=of(default), **gradients)

    if _are_split_explicitly(arrays):
        return default(*arrays)
    compute.defvjp(forward, backward)
    return compute(*varying_alike(arrays))


def _are_split_explicitly(arrays: tuple[jax.Array, ...]) -> bool:
    """Returns whether arrays are on a mesh whose axes are part of their types, as those of `jax.make_mesh` are.

    There JAX asks how each product over a split axis is to be split, which only its own gradients answer.
    """
    return any(AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types for array in arrays)


def on_gpus(form: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Maps the platform names of GPUs to one implementation: `by_platform(plain, x, **on_gpus(form))`."""
    return {"cuda": form, "rocm": form}


def varying_alike(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Marks replicated arrays as device-varying over every mesh axis over which another array varies.

    Within `jax.shard_map` the gradient of a replicated array is then summed over devices outside the implementation.
    """

    def varying(array: jax.Array) -> frozenset[str]:
        # No getattr default: if JAX renames the attribute, this must fail. Without the mark the result would be
        # right, but more values would be summed over devices.
        return jax.typeof(array).manual_axis_type.varying

    axes = frozenset().union(*map(varying, arrays))
    missing = [tuple(axes - varying(array)) for array in arrays]
    return tuple(
        lax.pcast(array, more, to="varying") if more else array for array, more in zip(arrays, missing, strict=True)
    )
