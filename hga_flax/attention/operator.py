"""HGA from the map to the hidden layer of its excitation as one product with one matrix (exact).

From the map that the attention sees to the ReLU of the EE everything is linear: the FC that narrows it (z = x F), the
MFE's convolutions K, the HAP's cells and the EE's first FC S. With the 0/1 matrices of `shift_pool.py` divided by the
cells' extents, P for the rows and Q for the columns, a hidden unit r of an image is

    hidden[r] = sum_{h, w, d} x[h, w, d] * M[r, h, w, d]
    M[r, h, w, d] = sum_{c, u, v, cells a x b} F[d, c] P[a, u, h] K[u, v, c] Q[b, v, w] S[a, b, c, r]

M is made once a step, whatever the batch, of small products. The map is then read once in the forward pass, nothing
of its size is written, and the gradient that flows back into it has the rank of the hidden layer: a few products for
each element, computed where it is added. That suits a GPU in training, which waits for its memory; one image
alone would wait for M. benchmarks/NOTES.md has the measurements.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hga_flax.attention.platforms import on_gpus
from hga_flax.attention.shift_pool import cell_edges, shifted_cells


def excitation_operator(
    kernels: jax.Array, suppress: jax.Array, height: int, width: int, bins: Sequence[int]
) -> jax.Array:
    """Returns the matrix from a map to the hidden layer of the excitation.

    Args:
        kernels: of the MFE, `[S, K, K, I, C]`, K odd, as made by `shift_pool.stack_kernels`; I channels are a group.
        suppress: the EE's first FC, `[S, cells, C, R]`; the cells of each bin row by row, bins in order.
        height: of the map.
        width: of the map.
        bins: cells along each axis, for example `(1, 2, 4)`.

    Returns:
        At least float32 `[C, R, H, W]`.
    """
    scales, size, _, group_size, channels = kernels.shape
    wide = jnp.promote_types(kernels.dtype, jnp.float32)
    rows, columns = (jnp.asarray(_shifted_means(length, bins, size // 2), wide) for length in (height, width))
    kernels = kernels.astype(wide).reshape(scales, size, size, group_size, -1, group_size)
    grid = _grid(suppress.astype(wide), bins)
    grid = grid.reshape(*grid.shape[:3], channels // group_size, group_size, -1)
    # Sums of a few products each, not products of matrices: on a GPU each is one small kernel, its gradients are one
    # each, and nothing is padded to the tiles of a product. What is summed over, here or backwards, lies together.
    by_row = (rows[..., None] * kernels.transpose(1, 4, 3, 2, 0, 5).reshape(size, 1, 1, -1)).sum(axis=0)
    by_row = by_row.reshape(sum(bins), height, -1, group_size, size, scales, group_size)  # [rows, H, g, I, K, S, I]
    by_row = by_row.transpose(2, 3, 1, 4, 0, 5, 6)[:, :, None, :, :, None]
    grid = grid.transpose(3, 5, 2, 1, 0, 4)[:, None, :, None, None]
    # [groups, I, R, H, columns of taps, columns of cells, rows of cells, S, I] without the last three
    hidden = (by_row * grid).sum(axis=(-3, -2, -1))
    hidden = hidden.reshape(channels, -1, height, size * sum(bins), 1)
    return (hidden * columns.reshape(size * sum(bins), width)).sum(axis=-2)


def _shifted_means(length: int, bins: Sequence[int], radius: int) -> np.ndarray:
    """Returns `[taps, sum(bins), length]`: `shifted_cells` of each bin, divided by the cells' extents."""
    means = []
    for j in bins:
        extents = np.array([stop - start for start, stop in cell_edges(length, j)])
        means.append(shifted_cells(length, j, radius) / extents[:, None, None])
    return np.concatenate(means).swapaxes(0, 1)


def _grid(suppress: jax.Array, bins: Sequence[int]) -> jax.Array:
    """Spreads the cells of all bins over one grid: `[S, cells, C, R]` -> `[S, sum(bins), sum(bins), C, R]`.

    Each bin has rows and columns of its own; where those of two bins cross there are zeros.
    """
    grid: Any = 0
    first = edge = 0
    for j in bins:
        cells = suppress[:, first : first + j * j]
        cells = cells.reshape(len(suppress), j, j, *suppress.shape[2:])
        margin = (edge, sum(bins) - edge - j)
        grid += jnp.pad(cells, ((0, 0), margin, margin, (0, 0), (0, 0)))
        first, edge = first + j * j, edge + j
    return grid


@jax.custom_vjp
def apply_operator(x: jax.Array, operator: jax.Array) -> jax.Array:
    """Returns `[B, R]`, at least float32: the products of maps `[B, H, W, D]` with an operator `[R, H, W, D]`."""
    return _forward(x, operator)[0]


def _forward(x: jax.Array, operator: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = lax.optimization_barrier(x)  # the products read the map itself: XLA would read, and keep, what it is made of
    y = jnp.dot(x.reshape(len(x), -1), operator.reshape(len(operator), -1).T, preferred_element_type=wide)
    return y, (x, operator)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, operator = saved
    # Written out, not as a product of matrices, for the compiler to compute it where the map's gradients are added.
    units = gradient.T[:, :, None, None, None] * operator[:, None].astype(gradient.dtype)
    to_operator = jnp.dot(gradient.T.astype(x.dtype), x.reshape(len(x), -1), preferred_element_type=gradient.dtype)
    return sum(units[1:], start=units[0]).astype(x.dtype), to_operator.reshape(operator.shape).astype(operator.dtype)


apply_operator.defvjp(_forward, _backward)


@jax.custom_vjp
def with_gradient_apart(x: jax.Array) -> jax.Array:
    """Returns `x`; on GPUs what flows back into this use of it is computed by itself, not added to another's within.

    A convolution of cuDNN adds a second map to its result, but the gradient of `apply_operator` would have to be
    written out for it first.
    """
    return x


with_gradient_apart.defvjp(
    lambda x: (x, None),
    lambda _, gradient: (lax.platform_dependent(gradient, default=lambda g: g, **on_gpus(lax.optimization_barrier)),),
)
