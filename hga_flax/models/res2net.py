"""Res2Net and Res2NeXt: the 3x3 of a bottleneck is replaced by a chain of narrower ones.

Gao et al., Res2Net: A New Multi-scale Backbone Architecture, IEEE TPAMI 2021,
https://arxiv.org/abs/1904.01169. The channels after the first 1x1 are split into `scale` groups. Each
but the last has its own 3x3, which also reads the output of the previous 3x3, so that one block has
receptive fields of several sizes. The structure is that of the released weights, in timm's version: in a stage's
first block the 3x3s are independent, and the last group is averaged over 3x3 windows, counting the padding.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory
from hga_flax.models.pooling import average_pool
from hga_flax.models.resnet import PAD1, ModuleDef, ResidualNetwork, block_width, finish_bottleneck


class Res2Bottleneck(nn.Module):
    """1x1, chain of 3x3s, 1x1, attention, sum: `[B, H, W, C]` -> `[B, H / stride, W / stride, 4 * features]`.

    Attributes:
        features: base width of the stage (64, 128, 256, 512).
        width: number of channels of each 3x3; the first 1x1 has `scale` times as many.
        scale: number of channel groups after the first 1x1; 1 is a plain bottleneck.
        cardinality: number of convolution groups of each 3x3 (Res2NeXt: 8).
        average_down, zero_init_residual, stochastic_depth: see `Bottleneck`.
    """

    features: int
    width: int
    scale: int
    conv: ModuleDef
    norm: ModuleDef
    attention: AttentionFactory
    stride: int = 1
    cardinality: int = 1
    average_down: bool = False
    zero_init_residual: bool = False
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        first = self.stride > 1 or x.shape[-1] != 4 * self.features
        y = self.conv(self.scale * self.width, (1, 1), name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        groups = jnp.split(y, self.scale, axis=-1)
        made: list[jax.Array] = []
        for i, group in enumerate(groups[: max(1, self.scale - 1)]):
            group = group if first or not made else made[-1] + group
            group = self.conv(
                self.width,
                (3, 3),
                (self.stride, self.stride),
                padding=PAD1,
                feature_group_count=self.cardinality,
                name=f"conv2_{i + 1}",
            )(group)
            made.append(nn.relu(self.norm(name=f"norm2_{i + 1}")(group)))
        if self.scale > 1:
            made.append(average_pool(groups[-1], 3, self.stride, margin=1) if first else groups[-1])
        return finish_bottleneck(self, x, jnp.concatenate(made, axis=-1), train)


class Res2Net(ResidualNetwork):
    """Res2Net or Res2NeXt, see `ResidualNetwork` and `Res2Bottleneck`.

    Attributes:
        scale: number of channel groups in each block, at least one.
        width_per_group: channels of each 3x3 at `features` 64 and `cardinality` 1 (26 in 26w_4s).
        cardinality: number of convolution groups of each 3x3.

    Raises:
        ValueError: `scale` is not positive.
    """

    scale: int = 4
    width_per_group: int = 26
    cardinality: int = 1

    def block(self, features: int, **fields: Any) -> nn.Module:
        if self.scale < 1:
            raise ValueError(f"scale={self.scale} is not positive")
        width = block_width(features, self.width_per_group, self.cardinality)
        return Res2Bottleneck(features, width, self.scale, cardinality=self.cardinality, **fields)


_R50: dict[str, Any] = {"stage_sizes": (3, 4, 6, 3)}
_R101: dict[str, Any] = {"stage_sizes": (3, 4, 23, 3)}
_D: dict[str, Any] = {"stem_width": 32, "average_down": True}
NETWORKS = {
    "res2net50_26w_4s": partial(Res2Net, **_R50),
    "res2net50_26w_6s": partial(Res2Net, **_R50, scale=6),
    "res2net50_26w_8s": partial(Res2Net, **_R50, scale=8),
    "res2net50_48w_2s": partial(Res2Net, **_R50, width_per_group=48, scale=2),
    "res2net50_14w_8s": partial(Res2Net, **_R50, width_per_group=14, scale=8),
    "res2net101_26w_4s": partial(Res2Net, **_R101),
    "res2net50d": partial(Res2Net, **_R50, **_D),
    "res2net101d": partial(Res2Net, **_R101, **_D),
    "res2next50": partial(Res2Net, **_R50, width_per_group=4, cardinality=8),
}
