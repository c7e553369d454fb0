"""Average pooling of a convolution's output without computing the convolution (exact).

Averaging the output of a stride-1 convolution over a cell of positions is linear in the input:

    mean_{(h, w) in A x B} conv(z, K)[h, w] = sum_{u, v} K[u, v] * T[A, u, B, v]
    T[A, u, B, v] = mean_{(h, w) in A x B} z[h + u, w + v]           (z is zero outside the map)

T is a box sum that is separable into rows and columns, so it takes two small matrix products with
constant 0/1 matrices. Its size depends on the cells and the kernel, not on the map, so the
full-size convolution outputs are never computed. Derived from Eqs. 1-3 of Cao et al.,
Future Internet 12(11):178, 2020.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def cell_edges(length: int, bins: int) -> list[tuple[int, int]]:
    """Returns the `bins` cells of adaptive average pooling along an axis, as (start, stop).

    Cell i covers floor(i * length / bins) .. ceil((i + 1) * length / bins), as in PyTorch's
    `AdaptiveAvgPool2d`: cells overlap where `bins` does not divide `length`, and `length` may be
    smaller than `bins`.
    """
    return [(i * length // bins, -((i + 1) * length // -bins)) for i in range(bins)]


def shifted_cells(length: int, bins: int, radius: int) -> np.ndarray:
    """Returns the 0/1 matrix `[bins, 2 * radius + 1, length]` that sums each shifted cell.

    Entry [i, radius + u, h] is 1 where h - u lies in cell i: the input rows that kernel tap u reads
    for the outputs in that cell. Zeros and ones are exact in any dtype.
    """
    matrix = np.zeros((bins, 2 * radius + 1, length), np.float32)
    for i, (start, stop) in enumerate(cell_edges(length, bins)):
        for u in range(-radius, radius + 1):
            matrix[i, radius + u, max(start + u, 0) : max(stop + u, 0)] = 1
    return matrix


def shifted_means(z: jax.Array, bins: int, radius: int) -> jax.Array:
    """Computes T: `z` `[B, H, W, C]` -> `[B, bins, bins, taps, taps, C]`, at least float32."""
    _, height, width, _ = z.shape
    # The map and the 0/1 matrices may be bfloat16, but the sums are accumulated in float32.
    wide = jnp.promote_types(z.dtype, jnp.float32)
    rows = jnp.asarray(shifted_cells(height, bins, radius), z.dtype)
    columns = jnp.asarray(shifted_cells(width, bins, radius), wide)
    sums = jnp.einsum("auh,bhwc->bauwc", rows, z, preferred_element_type=wide)
    sums = jnp.einsum("xvw,bauwc->baxuvc", columns, sums)
    extent = [np.array([stop - start for start, stop in cell_edges(n, bins)], wide) for n in (height, width)]
    area = np.outer(*extent)[None, :, :, None, None, None]
    return sums / area


def stack_kernels(kernels: Sequence[jax.Array]) -> jax.Array:
    """Stacks odd-sized kernels `[k, k, I, O]`, zero-padded to the largest size: `[S, K, K, I, O]`."""
    size = max(kernel.shape[0] for kernel in kernels)
    padded = []
    for kernel in kernels:
        margin = (size - kernel.shape[0]) // 2
        padded.append(jnp.pad(kernel, ((margin, margin), (margin, margin), (0, 0), (0, 0))))
    return jnp.stack(padded)


def apply_kernels(means: jax.Array, kernels: jax.Array) -> jax.Array:
    """Contracts T with grouped kernels: `[B, y, x, K, K, C]`, `[S, K, K, C / G, C]` -> `[B, S, y * x, C]`."""
    batch, rows, columns, size, _, channels = means.shape
    scales, _, _, group_size, _ = kernels.shape
    kernels = kernels.astype(means.dtype)
    if group_size == 1:
        cells = jnp.einsum("byxuvc,suvc->bsyxc", means, kernels[:, :, :, 0, :])
    else:
        groups = channels // group_size
        means = means.reshape(batch, rows, columns, size, size, groups, group_size)
        kernels = kernels.reshape(scales, size, size, group_size, groups, group_size)
        cells = jnp.einsum("byxuvgi,suvigo->bsyxgo", means, kernels)
    return cells.reshape(batch, scales, rows * columns, channels)


def coarsen(cells: jax.Array, fine: int, coarse: int) -> jax.Array:
    """Averages `[..., fine * fine, C]` cells into `[..., coarse * coarse, C]`; `coarse` divides `fine`."""
    *lead, _, channels = cells.shape
    step = fine // coarse
    grid = cells.reshape(*lead, coarse, step, coarse, step, channels)
    return grid.mean(axis=(-4, -2)).reshape(*lead, coarse * coarse, channels)


def pooled_convolutions(z: jax.Array, kernels: jax.Array, bins: Sequence[int]) -> jax.Array:
    """Adaptive average pooling of grouped convolutions of `z`, without computing the convolutions.

    Args:
        z: feature map `[B, H, W, C]`.
        kernels: `[S, K, K, C / groups, C]`, K odd, as returned by `stack_kernels`.
        bins: grid sizes (cells along each axis), for example `(1, 2, 4)`.

    Returns:
        `[B, S, sum(j * j for j in bins), C]`, at least float32: the grids in the order of `bins`, each row by row.
    """
    _, height, width, _ = z.shape
    radius = kernels.shape[1] // 2
    computed: dict[int, jax.Array] = {}
    for j in sorted(set(bins), reverse=True):
        # Where a finer grid tiles the map evenly, averaging its cells saves another pass over the map.
        finer = [f for f in computed if f % j == 0 and height % f == 0 and width % f == 0]
        computed[j] = (
            coarsen(computed[finer[0]], finer[0], j) if finer else apply_kernels(shifted_means(z, j, radius), kernels)
        )
    return jnp.concatenate([computed[j] for j in bins], axis=2)
