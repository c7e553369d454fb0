"""Average pooling with all of PyTorch's options, which networks with released weights need.

https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html and AdaptiveAvgPool2d.html. The
divisor of a window depends only on its position, so it is a constant of the program.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hga_flax.attention.common import at_least_float32
from hga_flax.attention.shift_pool import cell_edges


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
