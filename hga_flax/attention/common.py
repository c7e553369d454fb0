"""What the comparators share: the size rule of their hidden layer, the input check, the gate."""

import jax
import jax.numpy as jnp


def hidden_channels(channels: int, ratio: int) -> int:
    """Returns the width of a bottleneck: `channels // ratio`, at least one.

    SE's CIFAR networks rely on the lower limit: 16 channels at ratio 16 leave one.

    Raises:
        ValueError: `ratio` is not positive.
    """
    if ratio < 1:
        raise ValueError(f"ratio={ratio} is not positive")
    return max(1, channels // ratio)


def check_map(module: str, x: jax.Array, channels: int) -> None:
    """Raises a ValueError that names `module` unless `x` is `[B, H, W, channels]`."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"{module}({channels}) needs a map [B, H, W, {channels}], not {list(x.shape)}")


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns `x` in float32, or in float64 if it is so: what pooling, softmax and gates compute in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def global_mean(x: jax.Array) -> jax.Array:
    """Averages over positions, at least in float32: `[B, H, W, C]` -> `[B, C]`."""
    return x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def gated(x: jax.Array, e: jax.Array) -> jax.Array:
    """Multiplies `x` by the sigmoid of `e`, taken at least in float32; `e` must broadcast to `x`."""
    return x * jax.nn.sigmoid(at_least_float32(e)).astype(x.dtype)
