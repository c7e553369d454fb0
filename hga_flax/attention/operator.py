"""HGA from its input map to the hidden layer of its excitation as a single matrix product (exact).

Everything between the input map and the ReLU of the EE is linear: the reducing FC (z = x F), the MFE's convolutions K,
the HAP's cells and the EE's first FC S. Let P (rows) and Q (columns) be the 0/1 matrices of `shift_pool.py` divided by
the extents of the cells. Then hidden unit r of an image is

    hidden[r] = sum_{h, w, d} x[h, w, d] * M[r, h, w, d]
    M[r, h, w, d] = sum_{c, u, v, cells a x b} F[d, c] P[a, u, h] K[u, v, c] Q[b, v, w] S[a, b, c, r]

M is built once per step from small products, independent of the batch size. The forward pass then reads the map once
and writes nothing of its size, and the gradient with respect to the map has the rank of the hidden layer: a few
products per element, computed where the gradients are added. This suits training on GPUs and CPUs, which is bound by
memory bandwidth; for a single image, building M would dominate. benchmarks/NOTES.md has the measurements.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hga_flax.attention.shift_pool import cell_edges, shifted_cells
from hga_flax.platforms import by_platform, on_gpus, platform_dependent


def excitation_operator(
    kernels: jax.Array, suppress: jax.Array, height: int, width: int, bins: Sequence[int], *, products: bool = False
) -> jax.Array:
    """Returns the matrix from a map to the hidden layer of the excitation.

    Args:
        kernels: MFE kernels `[S, K, K, I, C]`, K odd, I channels per group, as returned by `shift_pool.stack_kernels`.
        suppress: weights of the EE's first FC `[S, cells, C, R]`; grids in the order of `bins`, each row by row.
        height: height of the map.
        width: width of the map.
        bins: grid sizes (cells along each axis), for example `(1, 2, 4)`.
        products: use matrix products, which suit CPUs, instead of elementwise products, which suit GPUs.

    Returns:
        `[C, R, H, W]`, at least float32.
    """
    scales, size, _, group_size, channels = kernels.shape
    wide = jnp.promote_types(kernels.dtype, jnp.float32)
    rows, columns = (jnp.asarray(_shifted_means(length, bins, size // 2), wide) for length in (height, width))
    kernels = kernels.astype(wide).reshape(scales, size, size, group_size, -1, group_size)
    grid = _grid(suppress.astype(wide), bins)
    grid = grid.reshape(*grid.shape[:3], channels // group_size, group_size, -1)
    if products:
        by_row = jnp.einsum("uah,suvigo->gihvaso", rows, kernels)
        hidden = jnp.einsum("gihvaso,sabgor->girhvb", by_row, grid)
        return jnp.einsum("girhvb,vbw->girhw", hidden, columns).reshape(channels, -1, height, width)
    # Elementwise products and sums instead of matmuls: on a GPU each sum, and each of its gradients, is one small
    # kernel, and nothing is padded to matmul tiles. Axes that are summed over, here or in the gradients, are adjacent.
    by_row = (rows[..., None] * kernels.transpose(1, 4, 3, 2, 0, 5).reshape(size, 1, 1, -1)).sum(axis=0)
    by_row = by_row.reshape(sum(bins), height, -1, group_size, size, scales, group_size)  # [rows, H, g, I, K, S, I]
    by_row = by_row.transpose(2, 3, 1, 4, 0, 5, 6)[:, :, None, :, :, None]
    grid = grid.transpose(3, 5, 2, 1, 0, 4)[:, None, :, None, None]
    # [groups, I, R, H, columns of taps, columns of cells, rows of cells, S, I], summed over the last three
    hidden = (by_row * grid).sum(axis=(-3, -2, -1))
    hidden = hidden.reshape(channels, -1, height, size * sum(bins), 1)
    return (hidden * columns.reshape(size * sum(bins), width)).sum(axis=-2)


def _shifted_means(length: int, bins: Sequence[int], radius: int) -> np.ndarray:
    """Returns `[taps, sum(bins), length]`: `shifted_cells` of each grid, divided by the extents of its cells."""
    means = []
    for j in bins:
        extents = np.array([stop - start for start, stop in cell_edges(length, j)])
        means.append(shifted_cells(length, j, radius) / extents[:, None, None])
    return np.concatenate(means).swapaxes(0, 1)


def _grid(suppress: jax.Array, bins: Sequence[int]) -> jax.Array:
    """Arranges all grids as one block-diagonal grid: `[S, cells, C, R]` -> `[S, sum(bins), sum(bins), C, R]`.

    Each grid has its own rows and columns; entries off the diagonal blocks are zero.
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
    """Contracts maps `[B, H, W, D]` with an operator `[R, H, W, D]`; returns `[B, R]`, at least float32."""
    return _forward(x, operator)[0]


def _forward(x: jax.Array, operator: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = lax.optimization_barrier(x)  # the product must read this map, or XLA would read and keep the map's inputs
    y = jnp.dot(x.reshape(len(x), -1), operator.reshape(len(operator), -1).T, preferred_element_type=wide)
    return y, (x, operator)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, operator = saved
    # Elementwise instead of a matmul, so that the compiler can fuse it into the sum of the map's gradients.
    units = gradient.T[:, :, None, None, None] * operator[:, None].astype(gradient.dtype)
    to_operator = jnp.dot(gradient.T.astype(x.dtype), x.reshape(len(x), -1), preferred_element_type=gradient.dtype)
    return sum(units[1:], start=units[0]).astype(x.dtype), to_operator.reshape(operator.shape).astype(operator.dtype)


apply_operator.defvjp(_forward, _backward)


@jax.custom_vjp
def with_gradient_apart(x: jax.Array) -> jax.Array:
    """Returns `x`; on GPUs, keeps the gradient of this use of `x` from being fused with that of another use.

    A cuDNN convolution can add a second map to its result, but the gradient of `apply_operator` would have to be
    materialized for that first.
    """
    return x


with_gradient_apart.defvjp(
    lambda x: (x, None),
    lambda _, gradient: (platform_dependent(gradient, default=lambda g: g, **on_gpus(lax.optimization_barrier)),),
)


class Restoration(nn.Module):
    """FC without bias from the EE's result to all channels, applied together with the EE's second FC.

    Nothing lies between the two FCs, and the hidden layer is small. On GPUs they become one sum over its units, which
    the compiler fuses into the gate. As matrix products, each FC, its gradients and the casts of its weights would be
    separate kernels of a few microseconds each.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, excite: jax.Array) -> jax.Array:
        """`[B, hidden]`, `[hidden, C]` -> `[B, features]`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (excite.shape[-1], self.features), jnp.float32)

        def in_turn(hidden: jax.Array, excite: jax.Array, kernel: jax.Array) -> jax.Array:
            return (hidden.astype(self.dtype) @ excite.astype(self.dtype)) @ kernel.astype(self.dtype)

        def together(hidden: jax.Array, excite: jax.Array, kernel: jax.Array) -> jax.Array:
            both = (excite[:, :, None] * kernel).sum(axis=1)
            return (hidden[:, :, None] * both).sum(axis=1).astype(self.dtype)

        return by_platform(in_turn, hidden, excite, kernel, **on_gpus(together))
