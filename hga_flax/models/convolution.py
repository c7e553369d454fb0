"""Convolutions for training, with a form for each device; the result is the same up to rounding.

TPUs multiply 128x128 blocks, so groups of 4 to 32 channels leave most of a block empty, and XLA also
moves the map through [groups, channels] layouts. One dense convolution with a block-diagonal kernel
takes more arithmetic, which a ResNeXt step can spare, but moves fewer bytes, which bound the step. On
CPUs XLA's gradients of a grouped convolution are ten to sixty times slower than those of a dense
convolution or, for wide maps, of one matmul per tap. GPUs keep the grouped form.

Also on CPUs, XLA computes the gradient of a kernel as a convolution whose window is the whole map, at a
fifth to a half of the speed of a matmul. Here a block of the map at a time is copied into a matrix with a
row per output position and a column per kernel element (im2col), which stays in the core's cache while
it is multiplied. The gradient of the input of a strided convolution is the reverse: a matmul whose columns
are added where their elements came from. A 1x1 convolution is a matmul of `[B * H * W, C]`. A block uses one
core, because training uses a device per core (`training.cpu_devices`). benchmarks/NOTES.md has the
measurements.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hga_flax.platforms import by_platform, varying_alike

DENSE_WIDTH = 1024  # most channels for which TPUs use the dense form
CPU_DENSE_WIDTH = 256  # the same for CPUs
BLOCK_ELEMENTS = 2**17  # most elements of a block's matrix on CPUs: 512 KiB in float32
FEWEST_ROWS = 392  # fewest rows of such a matrix; with fewer, the kernel's gradient is read and written too often

Pads = tuple[tuple[int, int], ...]


def convolution(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, *, feature_group_count: int, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` of channels-last maps, for `flax.linen.Conv(conv_general_dilated=...)`.

    Args:
        x: `[B, H, W, C]`.
        kernel: `[h, w, C / groups, D]`.
        strides: strides along height and width.
        padding: padding as for `lax.conv_general_dilated`.
        feature_group_count: number of groups.
        **options: other options of `lax.conv_general_dilated`.
    """
    groups = feature_group_count

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, feature_group_count=groups, **options)

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, block_diagonal(kernel, groups), strides, padding, **options)

    def on_cpus(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _on_cpus(x, kernel, strides, padding, options)

    def dense_on_cpus(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return on_cpus(x, block_diagonal(kernel, groups))

    def taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *_pads(x, kernel, strides, padding), (0, 0)))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x = x.reshape(*x.shape[:3], groups, -1)
        kernels = kernel.reshape(-1, kernel.shape[2], groups, kernel.shape[3] // groups)
        product = partial(jnp.einsum, "bhwgc,cgd->bhwgd", preferred_element_type=wide)
        y: Any = sum(map(product, _taps(x, kernel.shape[:2], strides), kernels))
        return y.reshape(*y.shape[:3], -1).astype(x.dtype)

    if max(*(options.get("lhs_dilation") or (1,)), *(options.get("rhs_dilation") or (1,))) > 1:
        return plain(x, kernel)
    if groups == 1:
        return by_platform(plain, x, kernel, cpu=on_cpus)
    if groups == x.shape[-1]:
        return plain(x, kernel)
    forms = {"cpu": dense_on_cpus if x.shape[-1] <= CPU_DENSE_WIDTH else taps}
    if x.shape[-1] <= DENSE_WIDTH:
        forms["tpu"] = dense
    return by_platform(plain, x, kernel, **forms)


def block_diagonal(kernel: jax.Array, groups: int) -> jax.Array:
    """Expands a grouped kernel `[h, w, C / groups, D]` to a block-diagonal one `[h, w, C, D]`."""
    *_, inputs, outputs = kernel.shape
    of_input, of_output = jnp.arange(groups * inputs) // inputs, jnp.arange(outputs) // (outputs // groups)
    tiled = jnp.tile(kernel, (1, 1, groups, 1))
    return jnp.where(of_input[:, None] == of_output, tiled, jnp.zeros((), kernel.dtype))


def _on_cpus(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, options: Mapping[str, Any]
) -> jax.Array:
    """Computes a convolution that is neither grouped nor dilated, with gradients that are fast on CPUs."""
    pads = _pads(x, kernel, strides, padding)
    if kernel.shape[:2] == (1, 1) and not any(map(any, pads)):
        x = x if max(strides) == 1 else x[:, :: strides[0], :: strides[1]]
        # All that reads the map as a matrix reads the same one; XLA would write the map a second time for others.
        y = _multiply(x.reshape(-1, x.shape[-1]), kernel[0, 0], options.get("precision"))
        return y.reshape(*x.shape[:-1], -1)
    return _convolve(x, kernel, tuple(strides), pads, tuple(options.items()))


def _pads(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> Pads:
    """Returns the padding before and after along height and width, also for "SAME" and "VALID"."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return tuple((int(before), int(after)) for before, after in padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Pads, options: tuple) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, window_strides=strides, padding=pads, **dict(options))


def _forward(x: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Pads, options: tuple) -> tuple:
    return _convolve(x, kernel, strides, pads, options), (x, kernel)


def _backward(strides: Sequence[int], pads: Pads, options: tuple, saved: tuple, gradient: jax.Array) -> tuple:
    x, kernel = saved
    precision = dict(options).get("precision")
    if max(strides) == 1:
        convolve = lambda x: lax.conv_general_dilated(x, kernel, strides, pads, **dict(options))
        (to_input,) = jax.vjp(convolve, x)[1](gradient)
    else:
        to_input = _input_gradient(x, kernel, gradient, strides, pads, precision)
    return to_input, _kernel_gradient(x, kernel, gradient, strides, pads, precision)


_convolve.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """1x1 convolution as a product of matrices: `[N, C]` and `[C, D]` -> `[N, D]`."""
    return jnp.matmul(x, kernel, precision=precision)


def _multiply_forward(x: jax.Array, kernel: jax.Array, precision: Any) -> tuple:
    return _multiply(x, kernel, precision), (x, kernel)


def _multiply_backward(precision: Any, saved: tuple, gradient: jax.Array) -> tuple:
    x, kernel = saved
    rows = _largest_divisor(len(x), max(FEWEST_ROWS, BLOCK_ELEMENTS // x.shape[1]))

    def block(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = index * rows
        return lax.dynamic_slice_in_dim(x, start, rows), lax.dynamic_slice_in_dim(gradient, start, rows)

    # Also in blocks: for one large product XLA would write the map's gradient a second time, transposed.
    to_kernel = _sum_of_products(block, len(x) // rows, x, kernel, gradient, precision)
    return jnp.matmul(gradient, kernel.T, precision=precision), to_kernel


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _taps(x: jax.Array, size: Sequence[int], strides: Sequence[int]) -> list[jax.Array]:
    """Returns the map that each kernel element multiplies: padded `[B, H, W, C]` -> h * w maps `[B, H', W', C]`."""
    rows, columns = ((n - k) // s * s + 1 for n, k, s in zip(x.shape[1:3], size, strides, strict=True))
    return [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]] for i in range(size[0]) for j in range(size[1])
    ]


def _columns(x: jax.Array, size: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """Returns the elements in each window of a padded map: `[B, H, W, C]` -> `[B, H', W', h * w * C]`."""
    return jnp.concatenate(_taps(x, size, strides), axis=-1)


def _input_gradient(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: Sequence[int], pads: Pads, precision: Any
) -> jax.Array:
    collect = lambda x: _columns(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel.shape[:2], strides)
    to_columns = jnp.matmul(gradient, kernel.reshape(-1, kernel.shape[-1]).T, precision=precision)
    return jax.linear_transpose(collect, x)(to_columns)[0]


def _kernel_gradient(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: Sequence[int], pads: Pads, precision: Any
) -> jax.Array:
    size = kernel.shape[:2]
    batch, height, width, outputs = gradient.shape
    images, rows = block_shape(batch, height, width, math.prod(kernel.shape[:3]))
    bands = height // rows
    pad = lambda x: jnp.pad(x, ((0, 0), *pads, (0, 0)))
    x = pad(x) if bands > 1 else x  # whole images are padded block by block, in the cache

    def block(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        image, row = index // bands * images, index % bands * rows
        if bands > 1:
            high = (rows - 1) * strides[0] + size[0]
            part = lax.dynamic_slice(x, (image, row * strides[0], 0, 0), (images, high, *x.shape[2:]))
        else:
            part = pad(lax.dynamic_slice_in_dim(x, image, images))
        columns = _columns(part, size, strides)
        of_outputs = lax.dynamic_slice(gradient, (image, row, 0, 0), (images, rows, width, outputs))
        return columns.reshape(-1, columns.shape[-1]), of_outputs.reshape(-1, outputs)

    return _sum_of_products(block, batch // images * bands, x, kernel, gradient, precision)


def _sum_of_products(
    block: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    count: int,
    x: jax.Array,
    kernel: jax.Array,
    gradient: jax.Array,
    precision: Any,
) -> jax.Array:
    """Returns a kernel's gradient, the sum of columns.T @ of_outputs over all blocks.

    Args:
        block: returns the columns `[N, K]` and the outputs' gradient `[N, D]` of a block.
        count: number of blocks.
        x: map of which `block` takes parts, `[..., C]`.
        kernel: the kernel, `[..., D]` of K * D elements.
        gradient: gradient of which `block` takes parts, `[..., D]`.
        precision: precision of the products.
    """
    shape = math.prod(kernel.shape[:-1]), kernel.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # The product's left matrix is transposed in memory. With no more outputs than inputs, the outputs' gradient is
    # the smaller one; otherwise the other order was slower, also for the windows of a few channels.
    swapped = shape[1] <= x.shape[-1]

    def add_block(index: jax.Array, total: jax.Array) -> jax.Array:
        left, right = block(index)[:: -1 if swapped else 1]
        over_rows = (((0,), (0,)), ((), ()))
        return total + lax.dot_general(left, right, over_rows, precision=precision, preferred_element_type=wide)

    zeros = jnp.zeros(shape[::-1] if swapped else shape, wide)
    total = lax.fori_loop(0, count, add_block, varying_alike((zeros, x, gradient))[0])
    return (total.T if swapped else total).reshape(kernel.shape).astype(kernel.dtype)


def block_shape(batch: int, height: int, width: int, columns: int) -> tuple[int, int]:
    """Returns the number of images in a block and of rows of each; they divide `batch` and `height`.

    Args:
        batch, height, width: shape of the output.
        columns: columns of the block's matrix.
    """
    most = max(FEWEST_ROWS, BLOCK_ELEMENTS // columns)  # rows of the matrix
    if height * width > most:
        return 1, _largest_divisor(height, most // width)
    return _largest_divisor(batch, most // (height * width)), height


def _largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor up to a limit, at least 1."""
    return max(divisor for divisor in range(1, max(1, min(limit, number)) + 1) if number % divisor == 0)
