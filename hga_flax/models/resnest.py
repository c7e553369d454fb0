"""ResNeSt: split attention replaces a bottleneck's 3x3.

Zhang et al., ResNeSt: Split-Attention Networks, CVPR Workshops 2022, https://arxiv.org/abs/2004.08955.
A 3x3 computes `radix` maps; their sum is averaged over positions; FC, BatchNorm, ReLU, FC and a softmax
over the maps give their weights per channel. Split attention is part of the network and independent of
the `attention` option, which acts after the last norm as in a ResNet. The structure is that of the
released weights, in timm's version: a stem of three 3x3s, shortcuts that average before their 1x1, and
average pooling instead of strided 3x3s.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory
from hga_flax.attention.common import at_least_float32, global_mean
from hga_flax.models.pooling import average_pool
from hga_flax.models.resnet import PAD1, ModuleDef, ResidualNetwork, block_width, finish_bottleneck


class SplitAttention(nn.Module):
    """Weighted sum of `radix` maps from a 3x3: `[B, H, W, C]` -> `[B, H, W, channels]`, non-negative.

    Attributes:
        channels: number of output channels; the hidden layer has about `channels * radix / 4`, see `hidden_width`.
        radix: number of maps that the softmax weights; 1 gates a single map by a sigmoid.
        cardinality: number of groups with separate attention; the 3x3 has `radix` times as many.
    """

    channels: int
    radix: int
    cardinality: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = self.radix * self.cardinality
        y = self.conv(self.radix * self.channels, (3, 3), padding=PAD1, feature_group_count=groups, name="conv")(x)
        maps = jnp.split(nn.relu(self.norm(name="norm")(y)), self.radix, axis=-1)
        e = global_mean(sum(maps[1:], maps[0]))[:, None, None, :]
        # 1x1 convolutions rather than fully connected layers, because nn.Dense has no groups.
        fc = partial(self.conv, kernel_size=(1, 1), use_bias=True, feature_group_count=self.cardinality)
        e = nn.relu(self.norm(name="reduce_norm")(fc(hidden_width(self.channels * self.radix), name="reduce")(e)))
        e = at_least_float32(fc(self.radix * self.channels, name="select")(e))
        # The channels of `select` are ordered by cardinal group, then by map.
        e = e.reshape(e.shape[0], self.cardinality, self.radix, self.channels // self.cardinality)
        weights = nn.softmax(e, axis=2) if self.radix > 1 else nn.sigmoid(e)
        weights = weights.swapaxes(1, 2).reshape(e.shape[0], self.radix, 1, 1, self.channels).astype(y.dtype)
        weighted = [part * weights[:, i] for i, part in enumerate(maps)]
        return sum(weighted[1:], weighted[0])


def hidden_width(channels: int) -> int:
    """Returns a quarter of the channels, rounded to a multiple of 8, at least 32 (timm's make_divisible).

    Rounds up where rounding down would lose more than a tenth.
    """
    width = max(32, int(channels / 4 + 4) // 8 * 8)
    return width + 8 if width < 0.9 * channels / 4 else width


class SplitBottleneck(nn.Module):
    """1x1, split attention, 1x1, attention, sum: `[B, H, W, C]` -> `[B, H / stride, W / stride, 4 * features]`.

    Attributes:
        features: base width of the stage (64, 128, 256, 512).
        width: number of channels of the split attention.
        radix, cardinality: see `SplitAttention`.
        average_first: in a strided block, average before the split attention instead of after it.
        average_down, zero_init_residual, stochastic_depth: see `Bottleneck`.
    """

    features: int
    width: int
    conv: ModuleDef
    norm: ModuleDef
    attention: AttentionFactory
    stride: int = 1
    radix: int = 2
    cardinality: int = 1
    average_first: bool = False
    average_down: bool = True
    zero_init_residual: bool = False
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.conv(self.width, (1, 1), name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        if self.stride > 1 and self.average_first:
            y = average_pool(y, 3, self.stride, margin=1)
        y = SplitAttention(self.width, self.radix, self.cardinality, self.conv, self.norm, name="split_attention")(y)
        if self.stride > 1 and not self.average_first:
            y = average_pool(y, 3, self.stride, margin=1)
        return finish_bottleneck(self, x, y, train)


class ResNeSt(ResidualNetwork):
    """ResNeSt, see `ResidualNetwork` and `SplitBottleneck`.

    Attributes:
        radix: number of maps that each split attention weights.
        cardinality: number of groups with separate attention.
        width_per_group: channels of each group at `features` 64.
        average_first: see `SplitBottleneck`.

    Raises:
        ValueError: `radix` is not positive, or the groups do not divide a block's channels.
    """

    stem_width: int = 32
    average_down: bool = True
    radix: int = 2
    cardinality: int = 1
    width_per_group: int = 64
    average_first: bool = False

    def block(self, features: int, **fields: Any) -> nn.Module:
        if self.radix < 1:
            raise ValueError(f"radix={self.radix} is not positive")
        width = block_width(features, self.width_per_group, self.cardinality)
        if width % (self.radix * self.cardinality):
            groups = f"radix={self.radix} times cardinality={self.cardinality}"
            raise ValueError(f"{groups} does not divide the {width} channels of a block at features={features}")
        options: dict[str, Any] = {
            "radix": self.radix,
            "cardinality": self.cardinality,
            "average_first": self.average_first,
        }
        return SplitBottleneck(features, width, **options, **fields)


_GROUPED: dict[str, Any] = {"stage_sizes": (3, 4, 6, 3), "average_first": True}
NETWORKS = {
    "resnest14d": partial(ResNeSt, stage_sizes=(1, 1, 1, 1)),
    "resnest26d": partial(ResNeSt, stage_sizes=(2, 2, 2, 2)),
    "resnest50d": partial(ResNeSt, stage_sizes=(3, 4, 6, 3)),
    "resnest101e": partial(ResNeSt, stage_sizes=(3, 4, 23, 3), stem_width=64),
    "resnest200e": partial(ResNeSt, stage_sizes=(3, 24, 36, 3), stem_width=64),
    "resnest269e": partial(ResNeSt, stage_sizes=(3, 30, 48, 8), stem_width=64),
    "resnest50d_1s4x24d": partial(ResNeSt, **_GROUPED, radix=1, cardinality=4, width_per_group=24),
    "resnest50d_4s2x40d": partial(ResNeSt, **_GROUPED, radix=4, cardinality=2, width_per_group=40),
}
