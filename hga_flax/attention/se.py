"""Squeeze-and-excitation (SE).

Hu, Shen, Albanie, Sun, Wu: Squeeze-and-Excitation Networks, CVPR 2018 and IEEE TPAMI 2020,
https://arxiv.org/abs/1709.01507. Global average pooling, FC C -> C/r, ReLU, FC C/r -> C, sigmoid;
the result scales the channels. Cost: 2 C^2/r + C/r + C parameters (the last two terms are the
biases, which the released networks have and the paper's ablations omit) and 2 C^2/r
multiply-accumulates: 2,530,992 parameters in ResNet-50 with r = 16.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import at_least_float32, check_map, gated, global_mean, hidden_channels


class SqueezeExcitation(nn.Module):
    """SE: gates the channels of `[B, H, W, channels]` by their global means.

    Attributes:
        channels: number of channels C of the map.
        ratio: reduction ratio; the hidden layer has `channels // ratio` units.
        bias: use biases in both FCs.
        min_channels: minimum number of hidden units. timm's networks use 8, which matters below 128 channels.
        dtype: dtype of the computation; parameters, pooling and gate are float32.
        axis_name: unused (no batch statistics); every attention takes it.

    Raises:
        ValueError: the input does not have `channels` channels, or `ratio` or `min_channels` is not positive.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> SqueezeExcitation(64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """

    channels: int
    ratio: int = 16
    bias: bool = True
    min_channels: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype; sows `gate`, `[B, channels]`."""
        check_map("SqueezeExcitation", x, self.channels)
        if self.min_channels < 1:
            raise ValueError(f"min_channels={self.min_channels} is not positive")
        hidden = max(hidden_channels(self.channels, self.ratio), self.min_channels)
        e = nn.Dense(hidden, self.bias, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name="squeeze")(
            global_mean(x)
        )
        e = nn.Dense(self.channels, self.bias, dtype=self.dtype, name="excite")(nn.relu(e))
        self.sow("intermediates", "gate", nn.sigmoid(at_least_float32(e)))
        return gated(x, e[:, None, None, :])
