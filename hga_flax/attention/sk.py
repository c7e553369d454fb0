"""Selective kernel convolution (SK).

Li, Wang, Hu, Yang: Selective Kernel Networks, CVPR 2019, https://arxiv.org/abs/1903.06586. SK
replaces a block's 3x3 convolution, norm and ReLU by M branches of grouped 3x3 convolutions, one per
dilation, each with BatchNorm and ReLU. Their sum is averaged over positions; FC C -> d, BatchNorm,
ReLU, FC d -> M C and a softmax over the branches give the branch weights of each channel, with
d = max(C/r, L). Cost for C channels and G groups: M (9 C^2/G + 2 C) + C d + 2 d + M d C parameters,
M 9 H W C^2/G + (1 + M) C d multiply-accumulates.

In ResNeXt-50 32x4d with the defaults this is SKNet-50: 27,479,784 parameters, 4,462,710,784
multiply-accumulates at 224 (timm's skresnext50_32x4d; the paper reports 27.5 M and 4.47 G).
ResNeXt-101 32x4d with SK has 48,736,040 parameters and 8,448,724,992 multiply-accumulates. That
differs from the paper's SKNet-101 (48.9 M, 8.46 G); the authors' released definition has
48,686,760 parameters because one of its layers violates L = 32. Here L holds everywhere.
"""

import operator
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import at_least_float32, check_map, global_mean, hidden_channels


def select_channels(channels: int, ratio: int, min_channels: int) -> int:
    """Returns d = max(channels // ratio, min_channels) (the paper's Eq. 4; L is `min_channels`)."""
    return max(hidden_channels(channels, ratio), min_channels)


class SelectiveKernel(nn.Module):
    """SK, in place of a 3x3, its norm and its ReLU: `[B, H, W, D]` -> `[B, H / stride, W / stride, channels]`.

    Attributes:
        channels: number of output channels C; the input may have a different number.
        ratio: reduction ratio r in d = max(C / r, L).
        min_channels: lower limit L in d = max(C / r, L).
        dilations: dilation of each 3x3 branch; (1, 2) has receptive fields of 3x3 and 5x5.
        groups: number of groups of each branch; None keeps those of the convolution that is
            replaced (32 in a ResNeXt, 1 in a ResNet).
        stride: stride of each branch; set by the block.
        replaced_groups: number of groups of the replaced convolution; set by the block.
        dtype: dtype of the computation; parameters, pooling and softmax are float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.

    Raises:
        ValueError: `groups` does not divide the channels, or an option is out of range.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> SelectiveKernel(64, stride=2).init_with_output(jax.random.key(0), x)[0].shape
        (2, 4, 4, 64)
    """

    # Tells the block to put the module where its 3x3 would be instead of after its last norm.
    replaces_convolution: ClassVar[bool] = True
    given_by_block: ClassVar[tuple[str, ...]] = ("stride", "replaced_groups")

    channels: int
    ratio: int = 16
    min_channels: int = 32
    dilations: Sequence[int] = (1, 2)
    groups: int | None = None
    stride: int = 1
    replaced_groups: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[B, H, W, D]` -> `[B, ceil(H / stride), ceil(W / stride), channels]`, never negative."""
        groups = self.replaced_groups if self.groups is None else self.groups
        self._check(x, groups)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        branches = []
        for i, dilation in enumerate(self.dilations, start=1):
            y = nn.Conv(
                self.channels,
                (3, 3),
                (self.stride, self.stride),
                padding=((dilation, dilation), (dilation, dilation)),
                kernel_dilation=(dilation, dilation),
                feature_group_count=groups,
                use_bias=False,
                kernel_init=he,
                dtype=self.dtype,
                name=f"branch{i}_conv",
            )(x)
            branches.append(nn.relu(norm(name=f"branch{i}_norm")(y)))
        d = select_channels(self.channels, self.ratio, self.min_channels)
        e = nn.Dense(d, use_bias=False, dtype=self.dtype, name="reduce")(global_mean(reduce(operator.add, branches)))
        e = nn.relu(norm(name="reduce_norm")(e))
        count = len(branches)
        e = nn.Dense(count * self.channels, use_bias=False, dtype=self.dtype, name="select")(e)
        weights = nn.softmax(at_least_float32(e.reshape(-1, count, self.channels)), axis=1).astype(branches[0].dtype)
        return reduce(operator.add, [branch * weights[:, i, None, None, :] for i, branch in enumerate(branches)])

    def _check(self, x: jax.Array, groups: int) -> None:
        check_map("SelectiveKernel", x, self.channels, keeps_channels=False)
        if groups < 1 or self.channels % groups or x.shape[-1] % groups:
            raise ValueError(f"groups={groups} does not divide the channels {x.shape[-1]} -> {self.channels}")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations={tuple(self.dilations)}: every branch needs a positive dilation")
        if self.min_channels < 1:
            raise ValueError(f"min_channels={self.min_channels} is not positive")
