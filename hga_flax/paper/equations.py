"""Eqs. 8-12 of the paper, compared with the counts of the traced modules.

Cao, Gao, Choi, Duan, Future Internet 12(11):178, 2020, section 4. A multiply-accumulate counts as two
FLOPs here, as in Eqs. 8 and 10 (the paper's tables count it as one).
"""

import dataclasses

import flax.linen as nn
import jax

from hga_flax.attention import (
    HGA,
    ExcitationExploration,
    HierarchicalGlobalAveragePooling,
    MultiScaleFeatureExploitation,
)
from hga_flax.counting.complexity import Counts, complexity, count_operations

KERNELS = (1, 3, 5, 7)
CELLS = 21  # total cells of the 1x1, 2x2 and 4x4 grids


def mfe_flops(height: int, width: int, channels: int) -> int:
    """Eq. 8: FLOPs of the four depthwise convolutions on an `[H, W, C]` map."""
    return 2 * height * width * channels * sum(k * k for k in KERNELS)


def hap_flops(height: int, width: int, channels: int) -> int:
    """Eq. 9: additions of the three average poolings of an `[H, W, C]` map."""
    return 3 * height * width * channels


def ee_flops(channels: int) -> int:
    """Eq. 10: FLOPs of the two FCs; the first is applied to each of the four scales. `channels` must be even."""
    return 85 * channels**2 // 2


def hga_flops(height: int, width: int, channels: int) -> int:
    """Eq. 11: FLOPs of the whole mechanism, the sum of Eqs. 8-10."""
    return mfe_flops(height, width, channels) + hap_flops(height, width, channels) + ee_flops(channels)


def hga_params(channels: int) -> int:
    """Eq. 12: parameters of the whole mechanism. `channels` must be even."""
    return sum(k * k for k in KERNELS) * channels + 11 * channels**2 // 2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An equation's value and the traced module's count, both in FLOPs or both in parameters."""

    equation: str
    what: str
    paper: int
    counted: int
    note: str = ""


def compare_equations(height: int, width: int, channels: int) -> list[Comparison]:
    """Evaluates Eqs. 8-12 for an `[H, W, C]` map and counts the modules in the convolution form.

    Eq. 9 is exact only if height and width are multiples of 4: otherwise the cells of the
    adaptive pooling overlap and some elements are read twice.
    """
    mfe = _count(MultiScaleFeatureExploitation(channels, KERNELS), 1, height, width, channels)
    hap = _count(HierarchicalGlobalAveragePooling(), 1, height, width, channels)
    ee = _count(ExcitationExploration(channels), 1, len(KERNELS), CELLS, channels)
    whole = complexity(HGA(channels, reduced_channels=None, form="conv"), (height, width, channels))
    return [
        Comparison("8", "MFE, FLOPs", mfe_flops(height, width, channels), 2 * mfe.conv_fc_macs),
        Comparison(
            "9",
            "HAP, FLOPs",
            hap_flops(height, width, channels),
            hap.pool_reads,
            "pooling C channels; the concatenation of Eq. 2 has 4C, so pooling it costs four times Eq. 9",
        ),
        Comparison("10", "EE, FLOPs", ee_flops(channels), 2 * ee.conv_fc_macs),
        Comparison(
            "11",
            "HGA, FLOPs",
            hga_flops(height, width, channels),
            2 * whole.conv_fc_macs + whole.pool_reads,
            "the whole module pools 4C channels: 9HWC more than Eq. 9 has",
        ),
        Comparison("12", "HGA, parameters", hga_params(channels), whole.params),
    ]


def _count(module: nn.Module, *shape: int) -> Counts:
    """Counts the operations of one call of a module on a float32 array of this shape."""
    x = jax.ShapeDtypeStruct(shape, "float32")
    variables = jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), x)
    return count_operations(module.apply, variables, x)
