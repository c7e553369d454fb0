"""Convolutional block attention module (CBAM).

Woo, Park, Lee, Kweon: CBAM, ECCV 2018, https://arxiv.org/abs/1807.06521. The channel gate applies
one MLP C -> C/r -> C without bias to the global mean and to the global maximum and takes the
sigmoid of the sum. The spatial gate follows: mean and maximum over channels, a k x k convolution to
one channel, BatchNorm, sigmoid. Cost: 2 C^2/r + 2 k^2 + 2 parameters; 4 C^2/r + 2 k^2 H W
multiply-accumulates. As in timm, the MLP has no biases (the authors' code has them; the paper's
Eq. 2 does not), and BatchNorm follows the spatial convolution (as in the authors' code):
2,516,544 parameters in ResNet-50.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import at_least_float32, check_map, gated, global_mean, hidden_channels, largest


class ConvolutionalBlockAttention(nn.Module):
    """CBAM: gates the channels, then the positions, of `[B, H, W, channels]`.

    Attributes:
        channels: number of channels C of the map.
        ratio: reduction ratio; the MLP has `channels // ratio` hidden units, at least one.
        kernel_size: odd kernel size of the spatial convolution.
        bias: use biases in the MLP.
        spatial: False omits the spatial gate (the paper's ablation).
        dtype: dtype of the computation; parameters, pooling and gates are float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.

    Raises:
        ValueError: the input does not have `channels` channels, or an option is out of range.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> ConvolutionalBlockAttention(64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """

    channels: int
    ratio: int = 16
    kernel_size: int = 7
    bias: bool = False
    spatial: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype."""
        check_map("ConvolutionalBlockAttention", x, self.channels)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd and positive")
        hidden = hidden_channels(self.channels, self.ratio)
        squeeze = nn.Dense(hidden, self.bias, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name="squeeze")
        excite = nn.Dense(self.channels, self.bias, dtype=self.dtype, name="excite")
        batch, height, width, _ = x.shape  # the batch may be symbolic
        maximum = largest(x.reshape(batch, height * width, self.channels), 1)[:, 0]
        pooled = jnp.stack([global_mean(x), at_least_float32(maximum)])  # [2, B, C]
        e = excite(nn.relu(squeeze(pooled))).sum(axis=0)
        x = gated(x, e[:, None, None, :])
        if not self.spatial:
            return x
        mean = at_least_float32(x).mean(axis=-1, keepdims=True)
        planes = jnp.concatenate([mean, at_least_float32(largest(x, -1))], axis=-1)
        margin = self.kernel_size // 2
        conv = nn.Conv(
            1,
            (self.kernel_size, self.kernel_size),
            padding=((margin, margin), (margin, margin)),
            use_bias=False,
            dtype=self.dtype,
            name="spatial_conv",
        )
        norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=self.dtype, axis_name=self.axis_name, name="spatial_norm")
        return gated(x, norm(conv(planes), use_running_average=not train))
