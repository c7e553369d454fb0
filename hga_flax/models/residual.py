"""The end of a residual block in training, with a form for each device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hga_flax.platforms import on_gpus, platform_dependent


@jax.custom_vjp
def relu_of_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """`flax.linen.relu(x + y)` of two maps `[B, H, W, C]`, in value and gradient.

    On GPUs the result is saved and the gradient's mask computed from it. Otherwise XLA recomputes the mask from the
    inputs of the two maps, four maps or more, in every pass that needs it. benchmarks/NOTES.md has the measurements.
    """
    return nn.relu(x + y)


def _forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def keeping(x: jax.Array, y: jax.Array) -> jax.Array:
        return lax.optimization_barrier(nn.relu(x + y))

    out = platform_dependent(x, y, default=lambda x, y: nn.relu(x + y), **on_gpus(keeping))
    return out, (x, y, out)  # XLA keeps only what the platform's gradient reads


def _backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    def plain(x: jax.Array, y: jax.Array, out: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, y: nn.relu(x + y), x, y)[1](gradient)

    def by_result(x: jax.Array, y: jax.Array, out: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        masked = jnp.where(out > 0, gradient, jnp.zeros((), gradient.dtype))
        return masked.astype(x.dtype), masked.astype(y.dtype)

    return platform_dependent(*saved, gradient, default=plain, **on_gpus(by_result))


relu_of_sum.defvjp(_forward, _backward)
