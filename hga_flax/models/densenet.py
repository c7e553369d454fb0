"""DenseNet with an attention in every dense layer.

Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, CVPR 2017,
https://arxiv.org/abs/1608.06993. The structure is torchvision's (DenseNet-BC, compression 0.5).
Neither the DenseNet nor the HGA paper combines the two. Here the attention acts on a dense layer's
new features before the concatenation: like a residual block's main path before the sum, these are
the layer's contribution, and the features of earlier layers pass unchanged. They have 32 channels, so
HGA needs no reduction.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory
from hga_flax.attention.common import global_mean
from hga_flax.attention.registry import attend
from hga_flax.models.pooling import max_pool
from hga_flax.models.resnet import PAD1, ModuleDef, check_images, check_rate, layer_types, no_attention


class DenseLayer(nn.Module):
    """Norm-relu-1x1, norm-relu-3x3, attention: `[B, H, W, C]` -> `[B, H, W, C + growth]`.

    Attributes:
        growth: number of channels that the layer adds.
        bottleneck: the 1x1 has `bottleneck * growth` channels.
        dropout: dropout rate of the new features.
    """

    growth: int
    bottleneck: int
    conv: ModuleDef
    norm: ModuleDef
    attention: AttentionFactory
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(self.norm(name="norm1")(x))
        y = self.conv(self.bottleneck * self.growth, (1, 1), name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(self.growth, (3, 3), padding=PAD1, name="conv2")(y)
        y = attend(self.attention, y, train)
        if self.dropout > 0:
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nn.Module):
    """DenseNet-BC: `[B, H, W, 3]` -> logits `[B, num_classes]`.

    Attributes:
        block_sizes: number of dense layers in each dense block.
        num_classes: number of classes.
        attention: attention factory, called with (channels, name=...) for each layer's new features.
        growth: number of channels that each layer adds.
        features: number of channels of the stem.
        bottleneck: width of a layer's 1x1 in multiples of `growth`.
        dropout: dropout rate of each layer's new features; training needs a "dropout" rng.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        axis_name: mesh axis over which batch statistics are averaged, or None.

    Raises:
        ValueError: the dropout rate is out of range.
    """

    block_sizes: Sequence[int]
    num_classes: int = 1000
    attention: AttentionFactory = no_attention
    growth: int = 32
    features: int = 64
    bottleneck: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stride: ClassVar[int] = 32  # downsampling factor before the last pooling

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_images(x)
        check_rate("dropout", self.dropout)
        conv, norm, attention = layer_types(self, train, use_bias=False, padding=0)
        x = conv(self.features, (7, 7), (2, 2), padding=((3, 3), (3, 3)), name="stem_conv")(x.astype(self.dtype))
        x = nn.relu(norm(name="stem_norm")(x))
        x = (max_pool if train else nn.max_pool)(x, (3, 3), strides=(2, 2), padding=PAD1)
        for block, layers in enumerate(self.block_sizes, start=1):
            for layer in range(1, layers + 1):
                x = DenseLayer(
                    self.growth,
                    self.bottleneck,
                    conv,
                    norm,
                    attention,
                    dropout=self.dropout,
                    name=f"block{block}_layer{layer}",
                )(x, train)
            if block < len(self.block_sizes):
                x = nn.relu(norm(name=f"transition{block}_norm")(x))
                x = conv(x.shape[-1] // 2, (1, 1), name=f"transition{block}_conv")(x)
                # A 1x1 map has no 2x2 window and stays unchanged.
                window = tuple(min(2, length) for length in x.shape[1:3])
                x = nn.avg_pool(x, window, strides=window)
        x = nn.relu(norm(name="final_norm")(x))
        x = global_mean(x)
        return nn.Dense(self.num_classes, name="classifier")(x)


DenseNet121 = partial(DenseNet, block_sizes=(6, 12, 24, 16))
DenseNet161 = partial(DenseNet, block_sizes=(6, 12, 36, 24), growth=48, features=96)
DenseNet169 = partial(DenseNet, block_sizes=(6, 12, 32, 32))
DenseNet201 = partial(DenseNet, block_sizes=(6, 12, 48, 32))
