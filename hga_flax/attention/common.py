"""Helpers shared by the attentions: the width of the hidden layer, the input check, the gate."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


class Source(NamedTuple):
    """The factors of a block's map y `[B, H, W, C]`: y = (raw - center) * scale + offset, raw = inner @ kernel.

    In training, a block that ends in a 1x1 convolution and a norm passes this along with y to an
    attention that sets `uses_source = True`. Both methods give the same results and, up to rounding,
    the same gradients as the computation from y, with fewer passes over full-size maps.

    Attributes:
        inner: `[B, H, W, D]`, input of the 1x1 convolution.
        kernel: `[D, C]`, its weights.
        raw: `[B, H, W, C]`, its output.
        scale, offset, center: `[C]`, at least float32; no gradient flows through `center`.
        share: `[C]`, fraction of the gate to apply, see `IdentityStart`; None applies all of it.
    """

    inner: jax.Array
    kernel: jax.Array
    raw: jax.Array
    scale: jax.Array
    offset: jax.Array
    center: jax.Array
    share: jax.Array | None = None

    def project(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns folded `[D, F]` and offset `[F]` such that y @ weight = inner @ folded + offset.

        The product reads the inner map, which is narrower than y, and the gradient with respect to y stays
        elementwise: a gradient dz @ weight.T would have to be materialized before the norm's backward sums.
        """
        # These products of weights are small, so full precision is cheap even where it is not the default.
        both = jnp.concatenate([self.kernel * self.scale, (self.offset - self.center * self.scale)[None]])
        both = jnp.dot(both, weight, precision="highest")
        return both[:-1], both[-1]

    def gated(self, gate: jax.Array) -> jax.Array:
        """Returns y * gate in the dtype of `raw`; the gate is `[B, C]`, at least float32.

        Norm and gate combine into one affine map per image and channel. Its two gradients take one
        pass over the map, and those of the gate, the scale and the offset follow from them.
        """
        gate = gate if self.share is None else 1 + self.share * (gate - 1)
        scale, offset = self.scale * gate, self.offset * gate
        y = (self.raw - self.center) * scale[:, None, None] + offset[:, None, None]
        return y.astype(self.raw.dtype)


class Narrowed(NamedTuple):
    """A map z = x @ weight + offset that has not been computed yet.

    Attributes:
        x: `[B, H, W, D]`.
        weight: `[D, C]`, or None if z is x.
        offset: `[C]`, or None for zero.
    """

    x: jax.Array
    weight: jax.Array | None = None
    offset: jax.Array | None = None

    def map(self, dtype: DTypeLike) -> jax.Array:
        """Returns z, `[B, H, W, C]`."""
        if self.weight is None:
            return self.x
        z = self.x.astype(dtype) @ self.weight.astype(dtype)
        return z if self.offset is None else z + self.offset.astype(dtype)


def check_result(module: nn.Module, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns what an attention gave, `[B, H, W, C]`.

    Raises:
        ValueError: it has another shape; the network would broadcast it, or adapt its shortcut to it.
    """
    if y.shape != shape:
        name = type(module).__name__
        raise ValueError(f"attention {name} must return a map {list(shape)}, but returned {list(y.shape)}")
    return y


class Reduction(nn.Module):
    """FC without bias that reduces the channels at every position: `[B, H, W, C]` -> `[B, H, W, features]`."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, source: Source | None = None) -> Narrowed:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        if source is not None and source.inner.shape[-1] < x.shape[-1]:
            return Narrowed(source.inner, *source.project(kernel))
        return Narrowed(x, kernel)


def hidden_channels(channels: int, ratio: int) -> int:
    """Returns the width of a bottleneck: `channels // ratio`, at least one.

    Raises:
        ValueError: `ratio` is not positive.
    """
    if ratio < 1:
        raise ValueError(f"ratio={ratio} is not positive")
    return max(1, channels // ratio)


def check_map(module: str, x: jax.Array, channels: int, *, keeps_channels: bool = True) -> None:
    """Raises a ValueError that names `module` unless `x` is a floating-point map `[B, H, W, C]`.

    Args:
        module: class name of the attention.
        x: input of the attention.
        channels: number of channels that the attention was created for.
        keeps_channels: whether C must be equal to `channels`.
    """
    if not isinstance(channels, int | np.integer) or channels < 1:
        raise ValueError(f"{module}({channels!r}): the number of channels must be a positive integer")
    if x.ndim != 4 or 0 in x.shape[1:] or (keeps_channels and x.shape[-1] != channels):
        wanted = channels if keeps_channels else "C"
        raise ValueError(f"{module}({channels}) needs a map [B, H, W, {wanted}], not {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):  # the gate, between 0 and 1, would become 0 in an integer type
        raise ValueError(f"{module}({channels}) needs a floating-point map, not {x.dtype}")


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns `x` in float32 (float64 stays float64), the precision of pooling, softmax and gates."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def global_mean(x: jax.Array) -> jax.Array:
    """Averages over positions in at least float32: `[B, H, W, C]` -> `[B, C]`."""
    return x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def gated(x: jax.Array, e: jax.Array) -> jax.Array:
    """Multiplies `x` by the sigmoid of `e`, computed in at least float32; `e` must broadcast to `x`."""
    return x * jax.nn.sigmoid(at_least_float32(e)).astype(x.dtype)


def largest(x: jax.Array, axis: int) -> jax.Array:
    """Returns `x.max(axis, keepdims=True)`; of equal largest values the first gets the gradient, as in PyTorch.

    JAX's own gradient compares the operand with the maximum. If XLA computes the operand again for it, rounded
    otherwise, none is equal, and the gradient is 0 / 0 (seen on CPUs with jax 0.12). Here the place is kept.
    """

    @jax.custom_jvp
    def compute(x: jax.Array) -> jax.Array:
        return x.max(axis, keepdims=True)

    @compute.defjvp
    def derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        (x,), (tangent,) = primals, tangents
        place = x.argmax(axis, keepdims=True)
        places = lax.broadcasted_iota(place.dtype, x.shape, axis % x.ndim)
        return compute(x), jnp.where(places == place, tangent, 0).sum(axis, keepdims=True)

    return compute(x)
