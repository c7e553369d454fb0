"""Average pooling with all of PyTorch's options, and max pooling for training.

https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html and AdaptiveAvgPool2d.html. The
divisor of a window depends only on its position, so it is a constant of the program.

The gradient of max pooling needs neither a scatter nor a sort on GPUs and CPUs. That of `flax.linen.max_pool` goes
to the first largest element of each window. On GPUs XLA's operation for that, select_and_scatter, is a scatter
with atomic additions; with `--xla_gpu_deterministic_ops` it is a scatter after a sort of every element of the
pooled map: 51 million for a batch of 256 in a ResNet. Here the forward pass saves the position of each window's
largest element, one byte per output, and the backward pass adds one masked, padded map for each position of the
window, in a fixed order. CPUs use the same form; TPUs keep XLA's operation. benchmarks/NOTES.md has the
measurements.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hga_flax.attention.common import at_least_float32
from hga_flax.attention.shift_pool import cell_edges
from hga_flax.platforms import on_gpus, platform_dependent

Window = tuple[int, int]
Padding = tuple[Window, Window]


def average_pool(
    x: jax.Array, size: int, stride: int, margin: int = 0, ceil: bool = False, count_margin: bool = True
) -> jax.Array:
    """Averages over windows of `size` x `size`: `[B, H, W, C]` -> `[B, H', W', C]`, in the same dtype.

    Args:
        x: the map; without `ceil` no side, excluding the margin, may be shorter than a window.
        size: window size.
        stride: distance between windows.
        margin: zero padding on each side of the map (PyTorch's `padding`).
        ceil: keep a last window that reaches past the edge (`ceil_mode`), divided by the part it covers.
        count_margin: count the padding in the average (`count_include_pad`).

    Examples:
        >>> average_pool(jnp.ones((2, 7, 7, 64)), 2, 2, ceil=True, count_margin=False).shape
        (2, 4, 4, 64)
    """
    padding, counts = zip(*(_windows(n, size, stride, margin, ceil, count_margin) for n in x.shape[1:3]), strict=True)
    sums = nn.pooling.pool(x, 0.0, lax.add, (size, size), (stride, stride), padding)
    divisor = np.multiply.outer(*counts)[None, :, :, None]
    return sums / jnp.asarray(divisor if (divisor != divisor.flat[0]).any() else divisor.flat[0], x.dtype)


def _windows(
    length: int, size: int, stride: int, margin: int, ceil: bool, count_margin: bool
) -> tuple[tuple[int, int], list[int]]:
    """Returns the padding along one axis, and the divisor of each window along it."""
    reach = length + 2 * margin - size
    count = (-(-reach // stride) if ceil else reach // stride) + 1
    if ceil and (count - 1) * stride >= length + margin:  # drop a window that starts past the map
        count -= 1
    low, high = (-margin, length + margin) if count_margin else (0, length)
    spans = [(max(i * stride - margin, low), min(i * stride - margin + size, high)) for i in range(count)]
    after = max(0, (count - 1) * stride + size - length - margin)
    return (margin, after), [stop - start for start, stop in spans]


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages to `size` x `size` cells in at least float32: `[B, H, W, C]` -> `[B, size, size, C]`.

    The cells are those of `cell_edges`.
    """
    x = at_least_float32(x)
    for axis in (1, 2):
        length = x.shape[axis]
        if length % size == 0:
            if length > size:
                x = x.reshape(*x.shape[:axis], size, length // size, *x.shape[axis + 1 :]).mean(axis=axis + 1)
            continue
        cells = [lax.slice_in_dim(x, *edge, axis=axis).mean(axis, keepdims=True) for edge in cell_edges(length, size)]
        x = jnp.concatenate(cells, axis=axis)
    return x


def max_pool(
    x: jax.Array,
    window: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[Sequence[int]] = "VALID",
) -> jax.Array:
    """`flax.linen.max_pool` of a floating-point map, with the same value and gradient, including for ties.

    Example: `max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))`.

    Args:
        x: `[B, H, W, C]`.
        window: height and width of the window.
        strides: strides along height and width; None for 1.
        padding: padding before and after along height and width, or "SAME" or "VALID".

    Returns:
        `[B, H', W', C]`.
    """
    strides = tuple(strides or (1, 1))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    return _pool(x, tuple(window), strides, tuple(tuple(pair) for pair in padding))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _pool(x: jax.Array, window: Window, strides: Window, padding: Padding) -> jax.Array:
    return nn.max_pool(x, window, strides, padding)


def _forward(
    x: jax.Array, window: Window, strides: Window, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    keeping = partial(_largest, window=window, strides=strides, padding=padding)

    def plain(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nn.max_pool(x, window, strides, padding)
        return y, jnp.zeros_like(y, _position_dtype(window))  # unused on this platform, so XLA removes them

    y, position = platform_dependent(x, default=plain, cpu=keeping, **on_gpus(keeping))
    return y, (x, position)  # on GPUs and CPUs x is unused and removed


def _backward(
    window: Window, strides: Window, padding: Padding, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array]:
    def plain(x: jax.Array, position: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: nn.max_pool(x, window, strides, padding), x)[1](gradient)[0]

    def selecting(x: jax.Array, position: jax.Array, gradient: jax.Array) -> jax.Array:
        return _spread(position, gradient, x.shape, window, strides, padding)

    return (platform_dependent(*saved, gradient, default=plain, cpu=selecting, **on_gpus(selecting)),)


_pool.defvjp(_forward, _backward)


def _position_dtype(window: Window) -> jnp.dtype:
    return jnp.dtype(jnp.int8 if window[0] * window[1] < 128 else jnp.int32)


def _offsets(window: Window) -> Iterator[tuple[int, int, int]]:
    """Yields the positions of a window in XLA's order: (number, row, column)."""
    for number in range(window[0] * window[1]):
        yield number, *divmod(number, window[1])


def _largest(x: jax.Array, window: Window, strides: Window, padding: Padding) -> tuple[jax.Array, jax.Array]:
    """Returns each window's largest element and the number of the first position that holds it."""
    margins = ((0, 0), *padding, (0, 0))
    x = jnp.pad(x, margins, constant_values=jnp.array(-jnp.inf, x.dtype))
    outputs = [(length - size) // stride for length, size, stride in zip(x.shape[1:3], window, strides, strict=True)]
    largest: Any = None
    position: Any = None
    for number, row, column in _offsets(window):
        here = x[
            :,
            row : row + outputs[0] * strides[0] + 1 : strides[0],
            column : column + outputs[1] * strides[1] + 1 : strides[1],
        ]
        if largest is None:
            largest, position = here, jnp.zeros_like(here, _position_dtype(window))
            continue
        position = jnp.where(here > largest, jnp.array(number, position.dtype), position)
        largest = lax.max(largest, here)  # propagates NaN
    return largest, position


def _spread(
    position: jax.Array,
    gradient: jax.Array,
    shape: Sequence[int],
    window: Window,
    strides: Window,
    padding: Padding,
) -> jax.Array:
    """Returns the gradient with respect to a map of shape `shape`, adding each output's gradient at its position."""
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    total = jnp.zeros(shape, wide)
    for number, *offset in _offsets(window):
        part = jnp.where(position == number, gradient, jnp.zeros((), gradient.dtype)).astype(wide)
        margins = []
        for axis in range(2):
            before, stride = offset[axis] - padding[axis][0], strides[axis]
            after = shape[1 + axis] - (before + (gradient.shape[1 + axis] - 1) * stride + 1)
            margins.append((before, after, stride - 1))
        total += lax.pad(part, jnp.zeros((), wide), ((0, 0, 0), *margins, (0, 0, 0)))
    return total.astype(gradient.dtype)
