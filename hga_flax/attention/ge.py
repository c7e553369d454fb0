"""Gather-excite (GE).

Hu, Shen, Albanie, Sun, Vedaldi: Gather-Excite, NeurIPS 2018, https://arxiv.org/abs/1810.12348. The
gather operator summarises neighbourhoods of a given extent; an MLP C -> C/r -> C may follow; the
result is upsampled to the map's size (nearest neighbour), and its sigmoid gates the map. The default
(global mean, MLP with biases) is equal to SE and has 2 C^2/r + C/r + C parameters; a learned gather
of extent e adds 11 C log2(e), a learned global one H W C + 2 C. The paper's GE-theta^- is
`mlp=False`, GE-theta is `mlp=False, learned=True`, GE-theta^+ is `learned=True`. The default is
timm's, global mean with MLP: 2,530,992 parameters in ResNet-50.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import at_least_float32, check_map, gated, global_mean, hidden_channels


def upsampled(cells: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour upsampling `[B, h, w, C]` -> `[B, height, width, C]`; row i reads row floor(i * h / height)."""
    rows = jnp.arange(height) * cells.shape[1] // height
    columns = jnp.arange(width) * cells.shape[2] // width
    return cells[:, rows][:, :, columns]


class GatherExcite(nn.Module):
    """GE: gates `[B, H, W, channels]` by summaries of neighbourhoods.

    Attributes:
        channels: number of channels C of the map.
        ratio: reduction ratio; the MLP has `channels // ratio` hidden units, at least one.
        extent: 0 for global; a power of two (at least 2) for windows of size 2 * extent - 1 at
            stride extent.
        learned: gather by depthwise convolutions with BatchNorm instead of a mean: log2(extent) of
            them, 3x3 with stride 2, or for the global extent one of the map's size, which ties the
            parameters to that size.
        mlp: apply FC, ReLU, FC between gather and gate.
        dtype: dtype of the computation; parameters and gate are float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.

    Raises:
        ValueError: the input does not have `channels` channels, an option is out of range, or a
            learned global gather was initialised for maps of another size.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> GatherExcite(64, extent=4).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """

    channels: int
    ratio: int = 16
    extent: int = 0
    learned: bool = False
    mlp: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype."""
        check_map("GatherExcite", x, self.channels)
        if self.extent != 0 and (self.extent < 2 or self.extent & (self.extent - 1)):
            raise ValueError(f"extent={self.extent} is not 0 (global) or a power of two from 2")
        cells = self._learned_cells(x, train) if self.learned else self._mean_cells(x)
        if self.mlp:
            hidden = hidden_channels(self.channels, self.ratio)
            cells = nn.Dense(hidden, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name="squeeze")(cells)
            cells = nn.Dense(self.channels, dtype=self.dtype, name="excite")(nn.relu(cells))
        if self.extent:
            cells = upsampled(cells, x.shape[1], x.shape[2])
        return gated(x, cells)

    def _mean_cells(self, x: jax.Array) -> jax.Array:
        """Averages over windows, excluding positions outside the map: `[B, H, W, C]` -> `[B, h, w, C]`."""
        if self.extent == 0:
            return global_mean(x)[:, None, None, :]
        size, margin = 2 * self.extent - 1, self.extent - 1
        return nn.avg_pool(
            at_least_float32(x),
            (size, size),
            strides=(self.extent, self.extent),
            padding=((margin, margin), (margin, margin)),
            count_include_pad=False,
        )

    def _learned_cells(self, x: jax.Array, train: bool) -> jax.Array:
        """Depthwise convolutions, each with a norm, and ReLUs between them: `[B, H, W, C]` -> `[B, h, w, C]`."""
        layers: list[tuple[Sequence[int], tuple[int, int], Any]]  # kernel, strides, padding
        if self.extent == 0:
            layers = [(x.shape[1:3], (1, 1), 0)]
        else:
            layers = [((3, 3), (2, 2), ((1, 1), (1, 1)))] * int(math.log2(self.extent))
        cells = x
        for i, (kernel, strides, padding) in enumerate(layers, start=1):
            name = f"gather_conv{i}"
            if self.extent == 0 and self.has_variable("params", name):
                initial: tuple[int, ...] = self.get_variable("params", name)["kernel"].shape[:2]
                if initial != kernel:
                    raise ValueError(f"learned global gather was initialised for maps of {initial}, not {kernel}")
            conv = nn.Conv(
                self.channels,
                kernel,
                strides,
                padding=padding,
                feature_group_count=self.channels,
                use_bias=False,
                dtype=self.dtype,
                name=name,
            )
            norm = nn.BatchNorm(
                momentum=0.9, epsilon=1e-5, dtype=self.dtype, axis_name=self.axis_name, name=f"gather_norm{i}"
            )
            cells = norm(conv(cells), use_running_average=not train)
            cells = nn.relu(cells) if i < len(layers) else cells
        return cells
