"""ResNet, ResNeXt and Wide ResNet for ImageNet-sized images, with an attention in every block.

He et al., Deep Residual Learning, CVPR 2016, https://arxiv.org/abs/1512.03385; Xie et al.,
Aggregated Residual Transformations (ResNeXt), CVPR 2017, https://arxiv.org/abs/1611.05431; Zagoruyko
and Komodakis, Wide Residual Networks, BMVC 2016, https://arxiv.org/abs/1605.07146. The structure is
torchvision's (v1.5): the stride is in the 3x3, padding is explicit on both sides. These networks, Res2Net
and ResNeSt share `ResidualNetwork` (stem, stages and head) and differ in the block.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory, Source, create_attention, replaces_convolution, uses_source
from hga_flax.attention.common import global_mean
from hga_flax.attention.operator import with_gradient_apart
from hga_flax.attention.registry import attend, attend_in_place
from hga_flax.models.convolution import convolution
from hga_flax.models.norm import BatchNorm
from hga_flax.models.pooling import average_pool, max_pool
from hga_flax.models.residual import relu_of_sum

ModuleDef = Any  # a partial of a module class

kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015; torchvision's choice
no_attention = partial(create_attention, "none")
PAD1 = ((1, 1), (1, 1))


def check_rate(option: str, rate: float) -> None:
    """Raises a ValueError unless a dropout rate is in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{option}={rate} must be at least 0 and less than 1")


def check_images(x: jax.Array) -> None:
    """Raises a ValueError unless `x` has four axes; a single image `[H, W, C]` would be pooled over the wrong axes."""
    if x.ndim != 4:
        raise ValueError(f"a network needs images [B, H, W, C], not {list(x.shape)}")


def survival_drop(y: jax.Array, rate: float, train: bool) -> jax.Array:
    """Stochastic depth: in training zeroes a block's branch `[B, H, W, C]` for a fraction `rate` of the images.

    Huang et al., Deep Networks with Stochastic Depth, ECCV 2016, https://arxiv.org/abs/1603.09382. Surviving
    branches are scaled up, so that inference needs no scaling. Call it within a block, with a "dropout" rng.
    """
    if not rate:
        return y
    return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=not train, name="stochastic_depth")(y)


def depth_rates(rate: float, blocks: int) -> list[float]:
    """Returns each block's rate of stochastic depth, l / L * `rate` for block l = 1 ... L (the paper's Eq. 4)."""
    return [rate * (block + 1) / blocks for block in range(blocks)]


def block_width(features: int, width_per_group: int, cardinality: int) -> int:
    """Returns the number of channels of a bottleneck's 3x3: `width_per_group` per group at `features` 64.

    Raises:
        ValueError: the width would be zero.
    """
    width = features * width_per_group // 64 * cardinality
    if width < 1:
        raise ValueError(f"width_per_group={width_per_group} leaves no channel at features={features}")
    return width


def layer_types(
    network: Any, train: bool, *, norm: ModuleDef = nn.BatchNorm, epsilon: float = 1e-5, **options: Any
) -> tuple[ModuleDef, ModuleDef, ModuleDef]:
    """Returns a network's convolution, norm and attention, as partials that its blocks complete.

    Args:
        network: module with `dtype`, `axis_name` and `attention`.
        train: training mode.
        norm: Flax's BatchNorm or `hga_flax.models.norm.BatchNorm`, which the blocks with a `Source` need.
        epsilon: epsilon of the norm.
        **options: options of every convolution.
    """
    conv = partial(nn.Conv, kernel_init=kernel_init, dtype=network.dtype, **options)
    if train:  # inference keeps the plain form, whose operations can be counted
        conv = partial(conv, conv_general_dilated=convolution)
    shared = {"dtype": network.dtype, "axis_name": network.axis_name}
    norm = partial(norm, use_running_average=not train, momentum=0.9, epsilon=epsilon, **shared)
    return conv, norm, partial(network.attention, **shared)


def with_source(conv: nn.Conv, norm: BatchNorm, x: jax.Array) -> tuple[jax.Array, Source]:
    """Returns norm(conv(x)) and its `Source`, for a 1x1 convolution without bias or stride."""
    raw = conv(with_gradient_apart(x))
    y, affine = norm(raw, return_affine=True)
    return y, Source(x, conv.variables["params"]["kernel"][0, 0], raw, *affine)


def finish_bottleneck(block: nn.Module, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
    """Applies the end of a bottleneck: the last 1x1 and its norm, the attention, and `join`.

    Call it within a block that has `Bottleneck`'s fields; it creates conv3, norm3 and attention.

    Args:
        block: the calling block.
        x: input of the block, `[B, H, W, C]`.
        y: output of its main path so far, `[B, H / stride, W / stride, D]`.
        train: True in training.
    """
    out = 4 * block.features
    scale_init = nn.initializers.zeros if block.zero_init_residual else nn.initializers.ones
    conv3 = block.conv(out, (1, 1), name="conv3")
    norm3 = block.norm(scale_init=scale_init, name="norm3")
    if replaces_convolution(block.attention):
        y = norm3(conv3(y))
    elif train and uses_source(block.attention):
        y, source = with_source(conv3, norm3, y)
        y = attend(block.attention, y, train, source)
    else:
        y = attend(block.attention, norm3(conv3(y)), train)
    return join(block, x, y, train)


def join(block: nn.Module, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
    """Adds a block's shortcut to its main path and applies a ReLU.

    Where the shapes differ, the shortcut is a 1x1 convolution and a norm (downsample_conv, downsample_norm). The 1x1 is
    strided, or with `block.average_down` preceded by a strided 2x2 average pooling (He et al., Bag of Tricks, CVPR
    2019, https://arxiv.org/abs/1812.01187: ResNet-D).
    """
    if x.shape != y.shape:
        strides = (block.stride, block.stride)
        if block.average_down and block.stride > 1:
            x, strides = average_pool(x, 2, block.stride, ceil=True, count_margin=False), (1, 1)
        x = block.conv(y.shape[-1], (1, 1), strides, name="downsample_conv")(x)
        x = block.norm(name="downsample_norm")(x)
    y = survival_drop(y, block.stochastic_depth, train)
    return relu_of_sum(x, y) if train else nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, attention, sum: `[B, H, W, C]` -> `[B, H / stride, W / stride, 4 * features]`.

    An attention that replaces a convolution (SK) replaces the 3x3, its norm and ReLU.

    Attributes:
        features: base width of the stage (64, 128, 256, 512).
        width: number of channels of the 3x3.
        cardinality: number of convolution groups of the 3x3.
        zero_init_residual: initialise the last norm's scale to zero, so that the block starts as the identity.
        stochastic_depth: fraction of the images for which only the shortcut is used in training.
        average_down: see `join`.
    """

    features: int
    width: int
    conv: ModuleDef
    norm: ModuleDef
    attention: AttentionFactory
    stride: int = 1
    cardinality: int = 1
    zero_init_residual: bool = False
    stochastic_depth: float = 0.0
    average_down: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.conv(self.width, (1, 1), name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        if replaces_convolution(self.attention):
            y = attend_in_place(self.attention, y, train, self.width, self.stride, self.cardinality)
        else:
            y = self.conv(
                self.width,
                (3, 3),
                (self.stride, self.stride),
                padding=PAD1,
                feature_group_count=self.cardinality,
                name="conv2",
            )(y)
            y = nn.relu(self.norm(name="norm2")(y))
        return finish_bottleneck(self, x, y, train)


class BasicBlock(nn.Module):
    """3x3, 3x3, attention, sum: `[B, H, W, C]` -> `[B, H / stride, W / stride, features]`.

    An attention that replaces a convolution (SK) replaces the first 3x3, its norm and ReLU. It cannot
    replace the second: SK ends in a ReLU, so the main path could only add to the shortcut.

    Attributes:
        features: number of channels of both convolutions.
        zero_init_residual, stochastic_depth, average_down: see `Bottleneck`.
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    attention: AttentionFactory
    stride: int = 1
    zero_init_residual: bool = False
    stochastic_depth: float = 0.0
    average_down: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        in_place = replaces_convolution(self.attention)
        if in_place:
            y = attend_in_place(self.attention, x, train, self.features, self.stride)
        else:
            y = self.conv(self.features, (3, 3), (self.stride, self.stride), padding=PAD1, name="conv1")(x)
            y = nn.relu(self.norm(name="norm1")(y))
        scale_init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        y = self.conv(self.features, (3, 3), padding=PAD1, name="conv2")(y)
        y = self.norm(scale_init=scale_init, name="norm2")(y)
        if not in_place:
            y = attend(self.attention, y, train)
        return join(self, x, y, train)


class ResidualNetwork(nn.Module):
    """Stem, stages of residual blocks, pooling and classifier: `[B, H, W, 3]` -> logits `[B, num_classes]`.

    Attributes:
        stage_sizes: number of blocks in each stage.
        num_classes: number of classes.
        attention: attention factory, called with (channels, name=...) in every block; follows the last
            norm or replaces a 3x3, see the blocks.
        features: base width of the stem and the first stage; each stage doubles it.
        zero_init_residual: see `Bottleneck`.
        stochastic_depth: rate of the last block; earlier rates grow linearly up to it, see `depth_rates` (training
            needs a "dropout" rng).
        dropout: dropout rate before the classifier; training needs a "dropout" rng.
        stem_width: 0 for a stem of one 7x7, otherwise the number of channels of a stem of three 3x3s, the last of
            which has twice as many (ResNet-C and -D: 32).
        average_down: see `join`.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        axis_name: mesh axis over which batch statistics are averaged, or None.

    Raises:
        ValueError: a rate or `stem_width` is out of range.
    """

    stage_sizes: Sequence[int]
    num_classes: int = 1000
    attention: AttentionFactory = no_attention
    features: int = 64
    zero_init_residual: bool = False
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    stem_width: int = 0
    average_down: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stride: ClassVar[int] = 32  # downsampling factor before the last pooling

    def block(self, features: int, **fields: Any) -> nn.Module:
        """Creates a block, called with (x, train), for a stage of base width `features`; `fields` are passed on."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_images(x)
        check_rate("stochastic_depth", self.stochastic_depth)
        check_rate("dropout", self.dropout)
        if self.stem_width < 0:
            raise ValueError(f"stem_width={self.stem_width} is negative")
        rates = iter(depth_rates(self.stochastic_depth, sum(self.stage_sizes)))
        conv, norm, attention = layer_types(self, train, norm=BatchNorm, use_bias=False, padding=0)
        x = x.astype(self.dtype)
        if self.stem_width:
            for i, (channels, stride) in enumerate(((1, 2), (1, 1), (2, 1)), start=1):
                strides, name = (stride, stride), f"stem_conv{i}"
                x = conv(channels * self.stem_width, (3, 3), strides, padding=PAD1, name=name)(x)
                x = nn.relu(norm(name=f"stem_norm{i}")(x))
        else:
            x = conv(self.features, (7, 7), (2, 2), padding=((3, 3), (3, 3)), name="stem_conv")(x)
            x = nn.relu(norm(name="stem_norm")(x))
        x = (max_pool if train else nn.max_pool)(x, (3, 3), strides=(2, 2), padding=PAD1)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = self.block(
                    self.features * 2**stage,
                    conv=conv,
                    norm=norm,
                    attention=attention,
                    stride=2 if stage > 0 and block == 0 else 1,
                    zero_init_residual=self.zero_init_residual,
                    stochastic_depth=next(rates),
                    average_down=self.average_down,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train)
        x = global_mean(x)
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train, name="classifier_dropout")(x)
        return nn.Dense(self.num_classes, name="classifier")(x)


class BasicResNet(ResidualNetwork):
    """A ResNet of basic blocks, see `ResidualNetwork` and `BasicBlock`."""

    hosts_convolution: ClassVar[bool] = True  # its blocks accept an attention that replaces a 3x3

    def block(self, features: int, **fields: Any) -> nn.Module:
        return BasicBlock(features, **fields)


class ResNet(ResidualNetwork):
    """A ResNet (`cardinality` 1) or ResNeXt of bottleneck blocks, see `ResidualNetwork` and `Bottleneck`.

    Attributes:
        cardinality: number of convolution groups of each 3x3 (ResNeXt: 32).
        width_per_group: channels per group at `features` 64 (ResNet: 64, ResNeXt 32x4d: 4,
            wide_resnet50_2: 128).
    """

    cardinality: int = 1
    width_per_group: int = 64
    hosts_convolution: ClassVar[bool] = True  # its blocks accept an attention that replaces a 3x3

    def block(self, features: int, **fields: Any) -> nn.Module:
        width = block_width(features, self.width_per_group, self.cardinality)
        return Bottleneck(features, width, cardinality=self.cardinality, **fields)


ResNet18 = partial(BasicResNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = partial(BasicResNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3))
ResNet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3))
ResNet152 = partial(ResNet, stage_sizes=(3, 8, 36, 3))
ResNeXt50 = partial(ResNet50, cardinality=32, width_per_group=4)
ResNeXt101 = partial(ResNet101, cardinality=32, width_per_group=4)
ResNeXt101Wide = partial(ResNet101, cardinality=32, width_per_group=8)
ResNeXt101Groups64 = partial(ResNet101, cardinality=64, width_per_group=4)
WideResNet50 = partial(ResNet50, width_per_group=128)
WideResNet101 = partial(ResNet101, width_per_group=128)
