"""ResNets for small images (CIFAR), post- and pre-activation, with an attention in every block.

He et al., Deep Residual Learning, CVPR 2016, section 4.2, https://arxiv.org/abs/1512.03385
(post-activation), and Identity Mappings in Deep Residual Networks, ECCV 2016,
https://arxiv.org/abs/1603.05027 (pre-activation, bottlenecks). Three stages of 16, 32 and 64 base
channels; 6n + 2 layers of basic blocks or 9n + 2 of bottlenecks.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory
from hga_flax.models.resnet import ModuleDef, kernel_init, no_attention

PAD1 = ((1, 1), (1, 1))


class SmallBlock(nn.Module):
    """A basic or bottleneck block: `[B, H, W, C]` -> `[B, H / stride, W / stride, out]`.

    Post-activation is conv-norm-relu with the relu after the sum; pre-activation norm-relu-conv
    with nothing after it. The attention acts on the main path's result, just before the sum. A
    bottleneck's stride sits in its first 1x1, as in both papers.

    Attributes:
        features: the stage's base width; `out` is `features`, or 4 times it in a bottleneck.
        shortcut: where the shape changes, "A" subsamples and pads channels with zeros (no
            parameters), "B" is a strided 1x1 convolution (with a norm in post-activation).
    """

    features: int
    conv: ModuleDef
    norm: ModuleDef
    attention: AttentionFactory
    stride: int = 1
    bottleneck: bool = False
    preact: bool = False
    shortcut: str = "B"

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

        y = x
        for i, (features, kernel, layer_strides, padding) in enumerate(layers, start=1):
            if self.preact:
                y = nn.relu(self.norm(name=f"norm{i}")(y))
                if i == 1 and changes:
                    x = y  # the shortcut of a block that changes the shape starts after the first activation
            y = self.conv(features, kernel, layer_strides, padding=padding, name=f"conv{i}")(y)
            if not self.preact:
                y = self.norm(name=f"norm{i}")(y)
                y = nn.relu(y) if i < len(layers) else y
        y = self.attention(out, name="attention")(y, train)
        if changes:
            x = self._shortcut(x, out, strides)
        return x + y if self.preact else nn.relu(x + y)

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
        num_classes: size of the output.
        attention: called with (channels, name=...) in every block, before the sum.
        bottleneck: blocks of 1x1, 3x3, 1x1 instead of two 3x3.
        preact: pre-activation blocks and a last norm before the pooling.
        shortcut: "A" or "B", see `SmallBlock`.
        features: width of the first stage (16); it doubles from stage to stage.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        axis_name: mesh axis over which batch statistics are averaged, or None.

    Raises:
        ValueError: the depth does not fit the block, or the shortcut is unknown.
    """

    depth: int
    num_classes: int = 10
    attention: AttentionFactory = no_attention
    bottleneck: bool = False
    preact: bool = False
    shortcut: str = "B"
    features: int = 16
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        blocks = blocks_per_stage(self.depth, self.bottleneck)
        if self.shortcut not in ("A", "B"):
            raise ValueError(f"shortcut={self.shortcut!r} is not 'A' or 'B'")
        conv = partial(nn.Conv, use_bias=False, padding=0, kernel_init=kernel_init, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        attention = partial(self.attention, dtype=self.dtype, axis_name=self.axis_name)
        x = conv(self.features, (3, 3), padding=PAD1, name="stem_conv")(x.astype(self.dtype))
        if not self.preact:
            x = nn.relu(norm(name="stem_norm")(x))
        for stage in range(3):
            for block in range(blocks):
                x = SmallBlock(
                    self.features * 2**stage,
                    conv,
                    norm,
                    attention,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    preact=self.preact,
                    shortcut=self.shortcut,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train)
        if self.preact:
            x = nn.relu(norm(name="final_norm")(x))
        x = x.mean(axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="classifier")(x)


def blocks_per_stage(depth: int, bottleneck: bool) -> int:
    """Returns n of a depth of 6n + 2 (basic) or 9n + 2 (bottleneck) layers.

    Raises:
        ValueError: no n fits; the message names the nearest depths that do.
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
