"""Hierarchical Global Attention (HGA).

Cao, Gao, Choi, Duan: Learning a Hierarchical Global Attention for Image Classification,
Future Internet 12(11):178, 2020, https://doi.org/10.3390/fi12110178.

Three stages on a map `[B, H, W, C]`: multi-scale feature exploitation (MFE, Eqs. 1-2), hierarchical global average
pooling (HAP, Eq. 3) and excitation exploration (EE, Eqs. 4-5); the sigmoid of the result gates the channels (Eqs.
6-7). Cost by the paper's count: 84 C + 11/2 C^2 parameters (Eq. 12). Everything up to the EE's ReLU is linear, so MFE
and HAP can also be computed exactly without the convolutions (`shift_pool.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hga_flax.attention.common import Narrowed, Reduction, Source, at_least_float32, check_map
from hga_flax.attention.operator import Restoration, apply_operator, excitation_operator
from hga_flax.attention.shift_pool import cell_edges, pooled_convolutions, stack_kernels
from hga_flax.platforms import by_platform, on_gpus

FORMS = ("auto", "conv", "shift")
PRESET = " (a preset may have set one of them)"
MOST_HIDDEN = 32  # most hidden units for the single-operator form, whose cost on GPUs grows with their number
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu, "tanh": nn.tanh}


class MultiScaleFeatureExploitation(nn.Module):
    """MFE, Eqs. 1-2: grouped convolutions of several kernel sizes, stride 1, no bias, concatenated.

    Attributes:
        channels: number of channels C of the input and of each scale.
        kernels: odd kernel sizes; zero padding keeps H x W.
        groups: number of groups of each convolution; None or C is depthwise.
        norm: apply BatchNorm after each convolution (not in the paper's equations).
        act: name of an activation after each scale (not in the paper's equations), or None.
        dtype: dtype of the computation; parameters are float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.

    Raises:
        ValueError: `kernels` is empty, even or not distinct, `groups` does not divide `channels`, or `act` is unknown.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> MultiScaleFeatureExploitation(64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 256)
    """

    channels: int
    kernels: Sequence[int] = (1, 3, 5, 7)
    groups: int | None = None
    norm: bool = False
    act: str | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        if len({k for k in self.kernels if k > 0 and k % 2}) < max(1, len(self.kernels)):
            raise ValueError(f"kernels={tuple(self.kernels)}: at least one size is needed; all must be odd and differ")
        groups = self.channels if self.groups is None else self.groups
        if groups < 1 or self.channels % groups:
            raise ValueError(f"groups={groups} does not divide the {self.channels} channels")
        if self.act is not None and self.act not in ACTIVATIONS:
            raise ValueError(f"mfe_act={self.act!r}; choose from: {', '.join(ACTIVATIONS)}")
        initial, width = nn.initializers.lecun_normal(), self.channels // groups
        self.weights = [
            self.param(f"kernel_{k}", initial, (k, k, width, self.channels), jnp.float32) for k in self.kernels
        ]
        if self.norm:
            self.norms = [
                nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=self.dtype, axis_name=self.axis_name, name=f"norm_{k}")
                for k in self.kernels
            ]

    def is_linear(self, train: bool) -> bool:
        """Returns whether the scales are an affine map of the input, so that averaging commutes with them."""
        return self.act is None and not (self.norm and train)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Reference form by convolutions: `[B, H, W, C]` -> `[B, H, W, S * C]`, scale by scale."""
        scales = []
        for i, weight in enumerate(self.weights):
            radius = weight.shape[0] // 2
            scale = lax.conv_general_dilated(
                x.astype(self.dtype),
                weight.astype(self.dtype),
                window_strides=(1, 1),
                padding=((radius, radius), (radius, radius)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.channels // weight.shape[2],
            )
            if self.norm:
                scale = self.norms[i](scale, use_running_average=not train)
            if self.act is not None:
                scale = ACTIVATIONS[self.act](scale)
            scales.append(scale)
        return jnp.concatenate(scales, axis=-1)

    def pooled(self, x: jax.Array, bins: Sequence[int], train: bool = False, merge: bool = False) -> jax.Array:
        """Shift-pooling form of MFE and HAP: `[B, H, W, C]` -> `[B, S, cells, C]`.

        With `merge` the scales are summed to `[B, 1, cells, C]`, which is all that a shared excitation needs. Without
        BatchNorm the kernels are summed instead. Raises a ValueError unless the MFE is linear.
        """
        if not self.is_linear(train):
            raise ValueError("form='shift' needs a linear MFE: mfe_act=None, and mfe_norm only in inference")
        kernels = stack_kernels(self.weights)
        if merge and not self.norm:
            kernels = kernels.sum(axis=0, keepdims=True)
        cells = pooled_convolutions(x.astype(self.dtype), kernels, bins)
        if self.norm:
            # In inference BatchNorm is affine per channel, so it can follow the averaging.
            normed = [norm(cells[:, i], use_running_average=True) for i, norm in enumerate(self.norms)]
            cells = jnp.stack(normed, axis=1)
            cells = cells.sum(axis=1, keepdims=True) if merge else cells
        return cells


class HierarchicalGlobalAveragePooling(nn.Module):
    """HAP, Eq. 3: adaptive average pooling to several grids, `[B, H, W, D]` -> `[B, cells, D]`.

    Attributes:
        bins: grid sizes (cells along each axis); (1, 2, 4) gives 1 + 4 + 16 = 21 cells.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> HierarchicalGlobalAveragePooling().apply({}, x).shape
        (2, 21, 64)
    """

    bins: Sequence[int] = (1, 2, 4)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, _ = x.shape
        x = at_least_float32(x)
        cells = []
        for j in self.bins:
            if height % j == 0 and width % j == 0:
                window = (height // j, width // j)
                cells.append(nn.avg_pool(x, window, strides=window).reshape(x.shape[0], j * j, x.shape[-1]))
            else:
                for top, bottom in cell_edges(height, j):
                    for left, right in cell_edges(width, j):
                        cells.append(x[:, top:bottom, left:right].mean(axis=(1, 2))[:, None])
        return jnp.concatenate(cells, axis=1)


class ExcitationExploration(nn.Module):
    """EE, Eqs. 4-5: FC, ReLU, FC, no bias: `[B, S, cells, C]` -> `[B, C]`.

    Attributes:
        channels: number of output channels C.
        reduction: reduction ratio; the hidden layer has C / reduction units (4 in the paper), at least one.
        excitation: "shared" applies one first FC of cells * C inputs to every scale and sums the results, the only
            reading that satisfies Eqs. 2, 4, 10 and 12; "concat" has a first FC over scales * cells * C inputs (Eqs. 2
            and 10 only).
        dtype: dtype of the computation; parameters are float32.

    Examples:
        >>> cells = jnp.ones((2, 4, 21, 64))
        >>> ExcitationExploration(64).init_with_output(jax.random.key(0), cells)[0].shape
        (2, 64)
    """

    channels: int
    reduction: int = 4
    excitation: str = "shared"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        cells: jax.Array | jax.ShapeDtypeStruct,
        first: Callable[[jax.Array], jax.Array] | None = None,
        second: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """`[B, S, cells, C]` -> `[B, C]`.

        Args:
            cells: pooled cells of each scale.
            first: replaces the first FC; maps its weights to `[B, hidden]`. Only the shape of `cells` is then used.
            second: replaces the second FC; maps the ReLU's output `[B, hidden]` and the FC's weights to the result.
        """
        if self.excitation not in ("shared", "concat"):
            raise ValueError(f"excitation={self.excitation!r} is not 'shared' or 'concat'")
        if self.reduction < 1:
            raise ValueError(f"reduction={self.reduction} is not positive")
        hidden = max(1, self.channels // self.reduction)
        _, scales, count, channels = cells.shape
        shape = (count, channels, hidden) if self.excitation == "shared" else (scales, count, channels, hidden)
        initial = nn.initializers.he_normal(in_axis=tuple(range(len(shape) - 1)), out_axis=-1)
        suppress = self.param("suppress", initial, shape, jnp.float32)
        excite = self.param("excite", nn.initializers.lecun_normal(), (hidden, self.channels), jnp.float32)
        e = nn.relu(_first_fc(cells, suppress, self.dtype) if first is None else first(suppress))
        return e.astype(self.dtype) @ excite.astype(self.dtype) if second is None else second(e, excite)


def _first_fc(cells: Any, suppress: jax.Array, dtype: Any) -> jax.Array:
    """First FC of `ExcitationExploration`, weights `[(S,) cells, C, hidden]`: `[B, S, cells, C]` -> `[B, hidden]`."""
    batch, scales = cells.shape[:2]
    # A shared FC is applied to every scale, as Eq. 10 counts it; shift pooling passes their sum as one scale.
    flat = cells.reshape(batch, scales if suppress.ndim == 3 else 1, -1).astype(dtype)
    return (flat @ suppress.reshape(-1, suppress.shape[-1]).astype(dtype)).sum(axis=1)


class HGA(nn.Module):
    """Hierarchical global attention: gates the channels of `[B, H, W, channels]`.

    Attributes:
        channels: number of channels A of the input and the output.
        reduced_channels: width between a reducing and a restoring FC (Table 1's HGA(A, 32, A)); None or >= A: no FCs.
        kernels: kernel sizes of the MFE (Table 6).
        bins: grid sizes of the HAP.
        groups: number of groups of the MFE's convolutions; None for one group per `group_size` channels.
        group_size: channels per group where `groups` is None; 1 is depthwise, as in Eq. 12.
        reduction: reduction ratio of the EE's hidden layer.
        excitation: "shared" or "concat", see `ExcitationExploration`.
        mfe: False removes the stage (Table 5): the map itself is the only scale.
        hap: False removes the stage: the whole map is the only cell.
        ee: False removes the stage: the sigmoid is applied to the average over scales and cells. With all three
            stages removed the module is the identity.
        mfe_norm: apply BatchNorm after each scale. The paper's equations have neither this nor an activation, which
            leaves the MFE linear; `mfe_norm` and `mfe_act` test whether that matters.
        mfe_act: name of an activation after each scale, or None.
        restore: "gate" applies the restoring FC to the attention vector (matches Table 2's FLOPs); "features" applies
            it to the gated map, as the text of section 5.1 says.
        restore_norm: apply BatchNorm to the restored vector before the sigmoid (Table 2's parameters).
        form: "conv" computes the convolutions, "shift" the equivalent shift pooling, "auto" uses "shift" wherever the
            MFE is linear. The parameters are the same.
        dtype: dtype of the computation; parameters and pooled cells are float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.

    Raises:
        ValueError: the input does not have `channels` channels, or an option is out of range.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> HGA(64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """

    channels: int
    reduced_channels: int | None = 32
    kernels: Sequence[int] = (1, 3, 5, 7)
    bins: Sequence[int] = (1, 2, 4)
    groups: int | None = None
    group_size: int = 1
    reduction: int = 4
    excitation: str = "shared"
    mfe: bool = True
    hap: bool = True
    ee: bool = True
    mfe_norm: bool = False
    mfe_act: str | None = None
    restore: str = "gate"
    restore_norm: bool = False
    form: str = "auto"
    dtype: Any = jnp.float32
    axis_name: str | None = None
    uses_source: ClassVar[bool] = True

    @property
    def gates_channels(self) -> bool:
        """True if the result is the map times a channel gate, which `Source.gated` applies if a source is given."""
        reduced = self.reduced_channels is not None and self.channels > self.reduced_channels
        return (self.mfe or self.hap or self.ee) and not (reduced and self.restore == "features")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, source: Source | None = None) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype; sows `cells`, `excitation` and `gate`.

        `source`: the factors of `x`, if known; the result is the same, with fewer passes over maps.
        """
        self._check(x)
        if not (self.mfe or self.hap or self.ee) or (x.shape[0] == 0 and not self.is_initializing()):
            return x
        width = min(self.channels, self.reduced_channels or self.channels)
        reduced = width < self.channels
        dense = lambda features, name: nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)
        narrow = Reduction(width, name="reduce")(x, source) if reduced else Narrowed(x)
        mfe = self._mfe(width) if self.mfe else None
        first = None
        if train and mfe is not None and self._folds(mfe, width):
            scales = 1 if self.excitation == "shared" else len(self.kernels)
            cells: Any = jax.ShapeDtypeStruct((len(x), scales, sum(j * j for j in self._bins()), width), jnp.float32)
            first = lambda suppress: self._hidden(narrow, mfe.weights, suppress)
            if self._is_watched():
                self.sow("intermediates", "cells", self._cells(narrow.map(self.dtype), mfe, train))
        else:
            cells = self._cells(narrow.map(self.dtype), mfe, train)
            self.sow("intermediates", "cells", cells)
        if self.ee:
            ee = ExcitationExploration(width, self.reduction, self.excitation, self.dtype, name="ee")
            if first and reduced and self.restore == "gate" and not self._is_watched() and not self.restore_norm:
                return self._gated(x, ee(cells, first, Restoration(self.channels, self.dtype, name="restore")), source)
            e = ee(cells, first)
        else:
            scales = len(self.kernels) if self.mfe else 1
            e = cells.sum(axis=1).mean(axis=1) / scales
        self.sow("intermediates", "excitation", e)
        if reduced and self.restore == "features":
            return dense(self.channels, "restore")(self._gated(narrow.map(self.dtype), e)).astype(x.dtype)
        if reduced:
            e = dense(self.channels, "restore")(e)
            if self.restore_norm:
                norm = nn.BatchNorm(
                    momentum=0.9, epsilon=1e-5, dtype=self.dtype, axis_name=self.axis_name, name="restore_norm"
                )
                e = norm(e, use_running_average=not train)
        return self._gated(x, e, source)

    def _is_watched(self) -> bool:
        return self.is_mutable_collection("intermediates")

    def _bins(self) -> tuple[int, ...]:
        return tuple(self.bins) if self.hap else (1,)

    def _mfe(self, channels: int) -> MultiScaleFeatureExploitation:
        if self.groups is None and channels % self.group_size:
            raise ValueError(f"group_size={self.group_size} does not divide the {channels} channels")
        groups = self.groups if self.groups is not None else channels // self.group_size
        return MultiScaleFeatureExploitation(
            channels, self.kernels, groups, self.mfe_norm, self.mfe_act, self.dtype, self.axis_name, name="mfe"
        )

    def _folds(self, mfe: MultiScaleFeatureExploitation, channels: int) -> bool:
        """Returns whether everything up to the EE's ReLU may be one operator: linear, and a small hidden layer."""
        linear = self.form != "conv" and mfe.is_linear(train=True)
        return linear and self.ee and channels // self.reduction <= MOST_HIDDEN

    def _hidden(self, narrow: Narrowed, kernels: Sequence[jax.Array], suppress: jax.Array) -> jax.Array:
        """Returns the EE's hidden layer before its ReLU, `[B, hidden]`, in the platform's form; used in training."""
        bins, dtype = self._bins(), self.dtype
        stacked = stack_kernels(kernels)
        if suppress.ndim == 3:  # shared by the scales, so their kernels can be summed into one
            stacked = stacked.sum(axis=0, keepdims=True)
        given = [part for part in narrow if part is not None]

        def by_cells(stacked: jax.Array, suppress: jax.Array, *given: jax.Array) -> jax.Array:
            z = Narrowed(*given).map(dtype).astype(dtype)
            return at_least_float32(_first_fc(pooled_convolutions(z, stacked, bins), suppress, dtype))

        def by_operator(stacked: jax.Array, suppress: jax.Array, *given: jax.Array, cpu: bool = False) -> jax.Array:
            x, weight, offset = Narrowed(*given)
            suppress = suppress if suppress.ndim == 4 else suppress[None]
            operator = excitation_operator(stacked, suppress, x.shape[1], x.shape[2], bins, products=cpu)
            hidden: Any = 0.0
            if weight is None:
                operator = operator.transpose(1, 2, 3, 0)
            else:
                rows = weight if offset is None else jnp.concatenate([weight, offset[None]])
                operator = jnp.einsum("crhw,dc->rhwd", operator, rows, precision="highest")
            if offset is not None:
                hidden, operator = operator[..., -1].sum(axis=(1, 2)), operator[..., :-1]
            # The barrier makes XLA add the offset where the sum is used, not broadcast it for the product first.
            return lax.optimization_barrier(apply_operator(x.astype(dtype), operator.astype(dtype))) + hidden

        on_cpus = partial(by_operator, cpu=True)
        return by_platform(by_cells, stacked, suppress, *given, cpu=on_cpus, **on_gpus(by_operator))

    def _cells(self, z: jax.Array, mfe: MultiScaleFeatureExploitation | None, train: bool) -> jax.Array:
        """MFE and HAP in the requested form: `[B, H, W, C]` -> `[B, S, cells, C]` (S = 1 if summed)."""
        pool = HierarchicalGlobalAveragePooling(self._bins(), name="hap")
        if mfe is None:
            return pool(z)[:, None]
        if self.form == "shift" or (self.form == "auto" and mfe.is_linear(train)):
            return mfe.pooled(z, self._bins(), train, merge=self.excitation == "shared" or not self.ee)
        cells = pool(mfe(z, train))
        return cells.reshape(*cells.shape[:2], -1, z.shape[-1]).swapaxes(1, 2)

    def _gated(self, x: jax.Array, e: jax.Array, source: Source | None = None) -> jax.Array:
        gate = nn.sigmoid(at_least_float32(e))
        self.sow("intermediates", "gate", gate)
        if source is not None:
            return source.gated(gate)
        return x * gate.astype(x.dtype)[:, None, None, :]

    def _check(self, x: jax.Array) -> None:
        check_map("HGA", x, self.channels)
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}; choose from: {', '.join(FORMS)}")
        if self.restore not in ("gate", "features"):
            raise ValueError(f"restore={self.restore!r} is not 'gate' or 'features'")
        if self.restore == "features" and self.restore_norm:
            raise ValueError(f"restore='features' has no vector for restore_norm=True{PRESET}; set restore_norm=False")
        for option in ("group_size", "reduction"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)} is not positive")
        if self.groups is not None and self.group_size != 1:
            given = f"groups={self.groups} and group_size={self.group_size}"
            raise ValueError(f"{given} contradict each other{PRESET}; set group_size=1, or leave out groups")
        if not self.bins or min(self.bins) < 1:
            raise ValueError(f"bins={tuple(self.bins)}: every grid needs at least one cell")
        if self.reduced_channels is not None and self.reduced_channels < 1:
            raise ValueError(f"reduced_channels={self.reduced_channels} is not positive")
