"""GoogLeNet (Inception v1) with an attention after each Inception block's concatenation.

Szegedy et al., Going Deeper with Convolutions, CVPR 2015, https://arxiv.org/abs/1409.4842. The attention
has the same place as in Fig. 2d of the HGA paper and in the SE paper's SE-Inception. The structure
is torchvision's, which follows TensorFlow's weights: convolutions without bias followed by BatchNorm
with epsilon 1e-3, max pooling that keeps a last partial window, and a 3x3 in the branch that the paper
calls 5x5 (https://github.com/pytorch/vision/issues/906; `true_5x5` restores the paper's 5x5).
"""

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory, HierarchicalGlobalAveragePooling
from hga_flax.attention.common import at_least_float32, global_mean
from hga_flax.attention.registry import attend
from hga_flax.models.pooling import max_pool
from hga_flax.models.resnet import PAD1, ModuleDef, check_images, check_rate, layer_types, no_attention

# Widths of the Inception blocks: 1x1; 1x1, 3x3; 1x1, "5x5"; 1x1 after pooling (the paper's Table 1).
BLOCKS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
POOL_AFTER = {"3b": 3, "4e": 2}  # size of the max pooling, stride 2, that follows a block
AUXILIARY_AFTER = {"4a": "auxiliary1", "4d": "auxiliary2"}


def max_pool_ceil(x: jax.Array, size: int, train: bool = False) -> jax.Array:
    """Max pooling with stride 2 that keeps a last partial window.

    `[B, H, W, C]` -> `[B, ceil((H - size) / 2) + 1, ..., C]`; a map smaller than the window yields one position.
    """
    padding = []
    for length in x.shape[1:3]:
        windows = max(1, -((length - size) // -2) + 1)
        padding.append((0, max(0, (windows - 1) * 2 + size - length)))
    return (max_pool if train else nn.max_pool)(x, (size, size), strides=(2, 2), padding=padding)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU: `[B, H, W, C]` -> `[B, H / stride, W / stride, features]`."""

    features: int
    size: int
    conv: ModuleDef
    norm: ModuleDef
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        margin = self.size // 2
        strides, padding = (self.stride, self.stride), ((margin, margin), (margin, margin))
        x = self.conv(self.features, (self.size, self.size), strides, padding=padding, name="conv")(x)
        return nn.relu(self.norm(name="norm")(x))


class Inception(nn.Module):
    """Four concatenated branches and the attention: `[B, H, W, C]` -> `[B, H, W, sum of the branches]`.

    Attributes:
        widths: channels of the 1x1; 3x3's reduction, 3x3; 5x5's reduction, 5x5; projection of the pooled map.
        size5: kernel size of the third branch.
    """

    widths: tuple[int, ...]
    unit: ModuleDef
    attention: AttentionFactory
    size5: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        one, reduce3, three, reduce5, five, project = self.widths
        pooled = (max_pool if train else nn.max_pool)(x, (3, 3), strides=(1, 1), padding=PAD1)
        branches = [
            self.unit(one, 1, name="branch1")(x),
            self.unit(three, 3, name="branch2")(self.unit(reduce3, 1, name="branch2_reduce")(x)),
            self.unit(five, self.size5, name="branch3")(self.unit(reduce5, 1, name="branch3_reduce")(x)),
            self.unit(project, 1, name="branch4")(pooled),
        ]
        y = jnp.concatenate(branches, axis=-1)
        return attend(self.attention, y, train)


class AuxiliaryHead(nn.Module):
    """Auxiliary classifier in the middle of the network: `[B, H, W, C]` -> logits `[B, num_classes]`."""

    num_classes: int
    unit: ModuleDef
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        cells = HierarchicalGlobalAveragePooling(bins=(4,), name="pool")(x)
        x = self.unit(128, 1, name="reduce")(cells.reshape(-1, 4, 4, x.shape[-1]))
        x = nn.relu(nn.Dense(1024, name="hidden")(at_least_float32(x.reshape(x.shape[0], -1))))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classifier")(x)


class GoogLeNet(nn.Module):
    """GoogLeNet: `[B, H, W, 3]` -> logits `[B, num_classes]`.

    Attributes:
        num_classes: number of classes.
        attention: attention factory, called with (channels, name=...) for each of the nine concatenations.
        aux_logits: add two auxiliary heads. In training only, their logits are sown into the collection
            "aux_logits" (names "auxiliary1_logits", "auxiliary2_logits"); `apply(..., mutable=[..., "aux_logits"])`
            returns them, each in a one-element tuple. The paper adds their losses times 0.3.
        true_5x5: use the paper's 5x5 in the third branch instead of torchvision's 3x3.
        transform_input: convert inputs normalised by ImageNet's statistics to (x - 0.5) / 0.5, which
            torchvision's released weights expect.
        dropout: dropout rate before the classifier; training needs a "dropout" rng.
        aux_dropout: dropout rate in the auxiliary heads.
        width_divisor: divides every width except the heads', for small experiments and tests.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        axis_name: mesh axis over which batch statistics are averaged, or None.

    Raises:
        ValueError: a dropout rate or the divisor is out of range.
    """

    num_classes: int = 1000
    attention: AttentionFactory = no_attention
    aux_logits: bool = False
    true_5x5: bool = False
    transform_input: bool = False
    dropout: float = 0.2
    aux_dropout: float = 0.7
    width_divisor: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stride: ClassVar[int] = 32  # downsampling factor before the last pooling

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_images(x)
        check_rate("dropout", self.dropout)
        check_rate("aux_dropout", self.aux_dropout)
        if self.width_divisor < 1 or any(w % self.width_divisor for widths in BLOCKS.values() for w in widths):
            raise ValueError(f"width_divisor={self.width_divisor} does not divide every width; 1, 2, 4 and 8 do")
        conv, norm, attention = layer_types(self, train, epsilon=1e-3, use_bias=False)
        unit = partial(ConvNorm, conv=conv, norm=norm)
        if self.transform_input:
            x = x * (jnp.array([0.229, 0.224, 0.225]) / 0.5) + (jnp.array([0.485, 0.456, 0.406]) - 0.5) / 0.5
        x = unit(64 // self.width_divisor, 7, stride=2, name="stem1")(x.astype(self.dtype))
        x = max_pool_ceil(x, 3, train)
        x = unit(64 // self.width_divisor, 1, name="stem2")(x)
        x = unit(192 // self.width_divisor, 3, name="stem3")(x)
        x = max_pool_ceil(x, 3, train)
        for block, widths in BLOCKS.items():
            narrowed = tuple(width // self.width_divisor for width in widths)
            size5 = 5 if self.true_5x5 else 3
            x = Inception(narrowed, unit, attention, size5, name=f"inception{block}")(x, train)
            if block in AUXILIARY_AFTER and self.aux_logits and (train or self.is_initializing()):
                name = AUXILIARY_AFTER[block]
                logits = AuxiliaryHead(self.num_classes, unit, self.aux_dropout, name=name)(x, train)
                if not self.is_initializing():  # `init` would return the sown logits among the variables
                    self.sow("aux_logits", f"{name}_logits", logits)  # `name` itself is taken by the head
            if block in POOL_AFTER:
                x = max_pool_ceil(x, POOL_AFTER[block], train)
        x = global_mean(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classifier")(x)
