"""Efficient channel attention (ECA).

Wang, Wu, Zhu, Li, Zuo, Hu: ECA-Net, CVPR 2020, https://arxiv.org/abs/1910.03151. Global average
pooling, one 1-D convolution of k taps along the channels (zero padding, no bias), sigmoid. Cost: k
parameters, k C multiply-accumulates, with k = |log2(C)/gamma + b/gamma| rounded to an odd number
(Eq. 12). The paper says "nearest odd". This follows the authors' code, which truncates and then
rounds up to the next odd number, and timm, which never goes below 3: 86 parameters in ResNet-50.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hga_flax.attention.common import at_least_float32, check_map, gated, global_mean


def adaptive_kernel_size(channels: int, gamma: float = 2.0, beta: float = 1.0) -> int:
    """Returns ECA's odd kernel size for `channels` channels, at least 3 (Eq. 12)."""
    taps = int(abs(math.log2(channels) + beta) / gamma)
    return max(3, taps if taps % 2 else taps + 1)


class EfficientChannelAttention(nn.Module):
    """ECA: gates each channel of `[B, H, W, channels]` by the means of the neighbouring channels.

    Attributes:
        channels: number of channels C of the map.
        kernel_size: odd number of taps, or None for `adaptive_kernel_size(channels)`.
        circular: wrap the channels around instead of zero padding (timm's "ceca").
        dtype: dtype of the computation; parameters, pooling and gate are float32.
        axis_name: unused (no batch statistics); every attention takes it.

    Raises:
        ValueError: the input does not have `channels` channels, or the kernel size is not odd.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> EfficientChannelAttention(64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """

    channels: int
    kernel_size: int | None = None
    circular: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype; sows `gate`, `[B, channels]`."""
        check_map("EfficientChannelAttention", x, self.channels)
        size = adaptive_kernel_size(self.channels) if self.kernel_size is None else self.kernel_size
        if size < 1 or size % 2 == 0:
            raise ValueError(f"kernel_size={size} must be odd and positive")
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=0, out_axis=1), (size, 1), jnp.float32)
        margin = size // 2
        mode = "wrap" if self.circular else "constant"
        means = jnp.pad(global_mean(x).astype(self.dtype), ((0, 0), (margin, margin)), mode=mode)
        e = lax.conv_general_dilated(
            means[:, :, None],
            kernel[:, :, None].astype(self.dtype),
            window_strides=(1,),
            padding="VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        self.sow("intermediates", "gate", nn.sigmoid(at_least_float32(e[:, :, 0])))
        return gated(x, e[:, None, None, :, 0])
