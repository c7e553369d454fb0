"""Convolutions for training, with a form for each device; the result is the same up to rounding.

TPUs multiply 128x128 blocks, so groups of 4 to 32 channels leave most of a block empty, and XLA also
moves the map through [groups, channels] layouts. One dense convolution with a block-diagonal kernel
takes more arithmetic, which a ResNeXt step can spare, but moves fewer bytes, which bound the step. On
CPUs XLA's gradients of a grouped convolution are ten to sixty times slower than those of a dense
convolution or, for wide maps, of one matmul per tap. GPUs keep the grouped form.

Also on CPUs, XLA computes the gradient of a 1x1 convolution's kernel as another convolution, for which
it transposes whole maps; a matmul avoids that. benchmarks/NOTES.md has the measurements.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hga_flax.attention.platforms import by_platform

DENSE_WIDTH = 1024  # most channels for which TPUs use the dense form
CPU_DENSE_WIDTH = 256  # the same for CPUs


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
    options |= {"window_strides": strides, "padding": padding}
    groups = feature_group_count

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, feature_group_count=groups, **options)

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, block_diagonal(kernel, groups), **options)

    def taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
        (down, right), (height, width) = strides, kernel.shape[:2]
        pads = padding
        if isinstance(padding, str):
            pads = lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        kernel = kernel.reshape(*kernel.shape[:3], groups, -1)
        rows, columns = (x.shape[1] - height) // down * down + 1, (x.shape[2] - width) // right * right + 1
        x = x.reshape(*x.shape[:3], groups, -1)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y: Any = sum(
            jnp.einsum(
                "bhwgc,cgd->bhwgd",
                x[:, i : i + rows : down, j : j + columns : right],
                kernel[i, j],
                preferred_element_type=wide,
            )
            for i in range(height)
            for j in range(width)
        )
        return y.reshape(*y.shape[:3], -1).astype(x.dtype)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = x if max(strides) == 1 else x[:, :: strides[0], :: strides[1]]
        return jnp.matmul(x, kernel[0, 0], precision=options.get("precision"))

    if max(*(options.get("lhs_dilation") or (1,)), *(options.get("rhs_dilation") or (1,))) > 1:
        return plain(x, kernel)
    if groups == 1 and kernel.shape[:2] == (1, 1) and (isinstance(padding, str) or not any(map(any, padding))):
        return by_platform(plain, x, kernel, cpu=product)
    if groups in (1, x.shape[-1]):
        return plain(x, kernel)
    forms = {"cpu": dense if x.shape[-1] <= CPU_DENSE_WIDTH else taps}
    if x.shape[-1] <= DENSE_WIDTH:
        forms["tpu"] = dense
    return by_platform(plain, x, kernel, **forms)


def block_diagonal(kernel: jax.Array, groups: int) -> jax.Array:
    """Expands a grouped kernel `[h, w, C / groups, D]` to a block-diagonal one `[h, w, C, D]`."""
    *_, inputs, outputs = kernel.shape
    of_input, of_output = jnp.arange(groups * inputs) // inputs, jnp.arange(outputs) // (outputs // groups)
    tiled = jnp.tile(kernel, (1, 1, groups, 1))
    return jnp.where(of_input[:, None] == of_output, tiled, jnp.zeros((), kernel.dtype))
