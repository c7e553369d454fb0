"""VGG, with or without BatchNorm, with an attention at the end of each stage.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015,
https://arxiv.org/abs/1409.1556. The structure is torchvision's: 3x3 convolutions with biases, and
average pooling to 7x7 before the three fully connected layers, so that any size from 32x32 works. VGG has no
residual blocks for an attention. Here it acts at the end of a stage, after the last ReLU and before the
max pooling, as it acts at the end of an Inception block.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory
from hga_flax.attention.registry import attend
from hga_flax.models.norm import BatchNorm
from hga_flax.models.pooling import adaptive_average_pool, max_pool
from hga_flax.models.resnet import PAD1, ModuleDef, check_images, check_rate, layer_types, no_attention

STAGE_SIZES = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}
POOLED = 7  # height and width of the map that the fully connected layers read


class Stage(nn.Module):
    """3x3 convolutions, attention, 2x2 max pooling: `[B, H, W, C]` -> `[B, H / 2, W / 2, features]`.

    Attributes:
        features: number of channels of every convolution.
        convolutions: number of convolutions.
        norm: BatchNorm after each convolution, or None.
    """

    features: int
    convolutions: int
    conv: ModuleDef
    norm: ModuleDef | None
    attention: AttentionFactory

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(1, self.convolutions + 1):
            x = self.conv(self.features, (3, 3), padding=PAD1, name=f"conv{i}")(x)
            x = nn.relu(self.norm(name=f"norm{i}")(x) if self.norm else x)
        x = attend(self.attention, x, train)
        return (max_pool if train else nn.max_pool)(x, (2, 2), strides=(2, 2))


class VGG(nn.Module):
    """VGG: `[B, H, W, 3]` -> logits `[B, num_classes]`.

    Attributes:
        stage_sizes: number of convolutions in each stage.
        num_classes: number of classes.
        attention: attention factory, called with (channels, name=...) at the end of each stage.
        batch_norm: apply BatchNorm after each convolution.
        features: number of channels of the first stage; each stage doubles it, up to 8 times as many.
        hidden: number of units of the two fully connected layers before the classifier.
        dropout: dropout rate after each of these; training needs a "dropout" rng.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        axis_name: mesh axis over which batch statistics are averaged, or None.

    Raises:
        ValueError: the dropout rate is out of range, or the images are too small: nothing is left of their maps.
    """

    stage_sizes: Sequence[int]
    num_classes: int = 1000
    attention: AttentionFactory = no_attention
    batch_norm: bool = True
    features: int = 64
    hidden: int = 4096
    dropout: float = 0.5
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stride: ClassVar[int] = 32  # downsampling factor before the last pooling

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_images(x)
        check_rate("dropout", self.dropout)
        conv, norm, attention = layer_types(self, train, norm=BatchNorm)
        x, (height, width) = x.astype(self.dtype), x.shape[1:3]
        for stage, convolutions in enumerate(self.stage_sizes):
            features = self.features * min(2**stage, 8)
            x = Stage(
                features, convolutions, conv, norm if self.batch_norm else None, attention, name=f"stage{stage + 1}"
            )(x, train)
        if 0 in x.shape[1:3]:
            least = 2 ** len(self.stage_sizes)
            raise ValueError(f"images of {height}x{width}: this VGG needs at least {least}x{least}")
        x = adaptive_average_pool(x, POOLED).reshape(x.shape[0], -1)
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01))
        for name in ("hidden1", "hidden2"):
            x = nn.relu(dense(self.hidden, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"{name}_dropout")(x)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="classifier")(x)


NETWORKS = {
    f"vgg{depth}{suffix}": partial(VGG, stage_sizes=sizes, batch_norm=bool(suffix))
    for suffix in ("", "_bn")
    for depth, sizes in STAGE_SIZES.items()
}
