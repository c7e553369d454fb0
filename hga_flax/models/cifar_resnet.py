"""ResNets and Wide ResNets for small images (CIFAR), with an attention in every block.

He et al., Deep Residual Learning, CVPR 2016, section 4.2, https://arxiv.org/abs/1512.03385
(post-activation), and Identity Mappings in Deep Residual Networks, ECCV 2016,
https://arxiv.org/abs/1603.05027 (pre-activation, bottlenecks). Three stages of 16, 32 and 64 base
channels; 6n + 2 layers with basic blocks or 9n + 2 with bottlenecks. Zagoruyko and Komodakis, Wide
Residual Networks, BMVC 2016, https://arxiv.org/abs/1605.07146: pre-activation basic blocks k times
as wide after the same stem; their depth, 6n + 4, also counts two of the shortcuts.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory, replaces_convolution
from hga_flax.attention.common import global_mean
from hga_flax.attention.registry import attend, attend_in_place
from hga_flax.models.residual import relu_of_sum
from hga_flax.models.resnet import (
    PAD1,
    ModuleDef,
    check_images,
    check_rate,
    depth_rates,
    layer_types,
    no_attention,
    survival_drop,
)


class SmallBlock(nn.Module):
    """A basic or bottleneck block: `[B, H, W, C]` -> `[B, H / stride, W / stride, out]`.

    Post-activation blocks are conv-norm-relu with a ReLU after the sum; pre-activation blocks are
    norm-relu-conv with nothing after the sum. The attention acts on the main path just before the sum.
    A bottleneck's stride is in its first 1x1, as in both papers.

    An attention that replaces a convolution (SK) replaces a bottleneck's 3x3 or a basic block's first
    one (in post-activation with its norm and ReLU). It cannot replace the second: SK ends in a ReLU, so
    the main path could only add to the shortcut, never subtract.

    Attributes:
        features: base width of the stage; `out` is `features`, or 4 times that in a bottleneck.
        shortcut: where the shape changes, "A" subsamples and zero-pads the channels (no parameters);
            "B" is a strided 1x1 convolution (with a norm in post-activation).
        dropout: dropout rate before the second convolution.
        stochastic_depth: fraction of the images for which only the shortcut is used in training.
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    attention: AttentionFactory
    stride: int = 1
    bottleneck: bool = False
    preact: bool = False
    shortcut: str = "B"
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride, self.stride)
        out = 4 * self.features if self.bottleneck else self.features
        changes = self.stride != 1 or x.shape[-1] != out
        if self.bottleneck:
            layers = [
                (self.features, (1, 1), strides, 0),
                (self.features, (3, 3), (1, 1), PAD1),
                (out, (1, 1), (1, 1), 0),
            ]
        else:
            layers = [(self.features, (3, 3), strides, PAD1), (out, (3, 3), (1, 1), PAD1)]

        replaced = (2 if self.bottleneck else 1) if replaces_convolution(self.attention) else None
        y = x
        for i, (features, kernel, layer_strides, padding) in enumerate(layers, start=1):
            if self.preact:
                y = nn.relu(self.norm(name=f"norm{i}")(y))
                if i == 1 and changes:
                    x = y  # a shortcut that changes the shape starts after the first activation
            if i == 2 and self.dropout > 0:
                y = nn.Dropout(self.dropout, deterministic=not train)(y)
            if i == replaced:
                y = attend_in_place(self.attention, y, train, features, layer_strides[0])
                continue
            y = self.conv(features, kernel, layer_strides, padding=padding, name=f"conv{i}")(y)
            if not self.preact:
                y = self.norm(name=f"norm{i}")(y)
                y = nn.relu(y) if i < len(layers) else y
        if replaced is None:
            y = attend(self.attention, y, train)
        if changes:
            x = self._shortcut(x, out, strides)
        y = survival_drop(y, self.stochastic_depth, train)
        if self.preact:
            return x + y
        return relu_of_sum(x, y) if train else nn.relu(x + y)

    def _shortcut(self, x: jax.Array, out: int, strides: tuple[int, int]) -> jax.Array:
        if self.shortcut == "A":
            x = x[:, :: strides[0], :: strides[1]]
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, out - x.shape[-1])))
        x = self.conv(out, (1, 1), strides, name="downsample_conv")(x)
        return x if self.preact else self.norm(name="downsample_norm")(x)


class CifarResNet(nn.Module):
    """A ResNet for small images: `[B, H, W, channels]` -> logits `[B, num_classes]`.

    Attributes:
        depth: number of layers, 6n + 2 (basic) or 9n + 2 (bottleneck).
        num_classes: number of classes.
        attention: attention factory, called with (channels, name=...) in every block; acts before the
            sum or replaces a 3x3, see `SmallBlock`.
        bottleneck: blocks of 1x1, 3x3, 1x1 instead of two 3x3s.
        preact: pre-activation blocks, and a final norm before the pooling.
        shortcut: "A" or "B", see `SmallBlock`.
        features: width of the stem and, times `widen`, of the first stage; each stage doubles it.
        widen: widening factor of the stages (Wide ResNet's k).
        dropout: dropout rate before each block's second convolution; training needs a "dropout" rng.
        stochastic_depth: rate of the last block; earlier rates grow linearly up to it, see `depth_rates`
            (training needs a "dropout" rng).
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        axis_name: mesh axis over which batch statistics are averaged, or None.

    Raises:
        ValueError: the depth does not fit the block, or an option is out of range.
    """

    depth: int
    num_classes: int = 10
    attention: AttentionFactory = no_attention
    bottleneck: bool = False
    preact: bool = False
    shortcut: str = "B"
    features: int = 16
    widen: int = 1
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stride: ClassVar[int] = 4  # downsampling factor before the last pooling
    hosts_convolution: ClassVar[bool] = True  # its blocks accept an attention that replaces a 3x3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        check_images(x)
        blocks = blocks_per_stage(self.depth, self.bottleneck)
        if self.shortcut not in ("A", "B"):
            raise ValueError(f"shortcut={self.shortcut!r} is not 'A' or 'B'")
        if self.widen < 1:
            raise ValueError(f"widen={self.widen} is not positive")
        check_rate("dropout", self.dropout)
        check_rate("stochastic_depth", self.stochastic_depth)
        rates = iter(depth_rates(self.stochastic_depth, 3 * blocks))
        conv, norm, attention = layer_types(self, train, use_bias=False, padding=0)
        x = conv(self.features, (3, 3), padding=PAD1, name="stem_conv")(x.astype(self.dtype))
        if not self.preact:
            x = nn.relu(norm(name="stem_norm")(x))
        for stage in range(3):
            for block in range(blocks):
                x = SmallBlock(
                    self.features * self.widen * 2**stage,
                    conv,
                    norm,
                    attention,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    preact=self.preact,
                    shortcut=self.shortcut,
                    dropout=self.dropout,
                    stochastic_depth=next(rates),
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train)
        if self.preact:
            x = nn.relu(norm(name="final_norm")(x))
        x = global_mean(x)
        return nn.Dense(self.num_classes, name="classifier")(x)


def blocks_per_stage(depth: int, bottleneck: bool) -> int:
    """Returns n for a depth of 6n + 2 (basic) or 9n + 2 (bottleneck) layers.

    Raises:
        ValueError: the depth is not of this form; the message names the nearest valid depths.
    """
    layers = 9 if bottleneck else 6
    n, rest = divmod(depth - 2, layers)
    if n < 1 or rest:
        low = max(1, n)
        kind = "bottleneck" if bottleneck else "basic"
        raise ValueError(
            f"depth {depth} is not {layers}n + 2, as {kind} blocks need; "
            f"the nearest are {layers * low + 2} and {layers * (low + 1) + 2}"
        )
    return n


def wide_depth(depth: int) -> int:
    """Converts a Wide ResNet's depth, 6n + 4 by its paper's count, to the `depth` 6n + 2 of `CifarResNet`.

    Raises:
        ValueError: the depth is not of this form; the message names the nearest valid depths.
    """
    n, rest = divmod(depth - 4, 6)
    if n < 1 or rest:
        low = max(1, n)
        raise ValueError(
            f"depth {depth} is not 6n + 4, as Wide ResNets need; the nearest are {6 * low + 4} and {6 * low + 10}"
        )
    return depth - 2
