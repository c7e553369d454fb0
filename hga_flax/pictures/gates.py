"""Reads what a network's attentions did to images: the channel gates, and the cells that drove HGA's gates."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from hga_flax.attention import HGA
from hga_flax.attention.hga import ExcitationExploration
from hga_flax.attention.identity_start import SHARE, IdentityStart

SHARED = " (share of the attention included)"  # appended to the title if the factors are not the gates alone


class BlockGates(NamedTuple):
    """The gates of one attention for B images.

    Attributes:
        stage: stage of the block, such as "stage1".
        block: name of the module that holds the attention, such as "stage1_block2".
        gate: gates `[B, C]`, from 0 (closed) to 1 (open).
        drive: for HGA `[B, cells, C]`, each cell's contribution to each gate's pre-activation, see `cell_drive`;
            else None.
        bins: for HGA the sizes of the grids of cells, such as (1, 2, 4); else ().
        share: `[C]`, the share of the gate that takes effect, see `IdentityStart`; None means all of it.
    """

    stage: str
    block: str
    gate: np.ndarray
    drive: np.ndarray | None
    bins: tuple[int, ...]
    share: np.ndarray | None = None

    @property
    def factor(self) -> np.ndarray:
        """The factor of each channel, `[B, C]`: the gate, weighted by the share if there is one."""
        return self.gate if self.share is None else 1 + self.share * (self.gate - 1)


def title(blocks: Sequence[BlockGates]) -> str:
    """Returns a title for the factors of the given blocks."""
    return "gates" + (SHARED if any(block.share is not None for block in blocks) else "")


def stage_of(block: str) -> str:
    """Returns the stage of a block: "stage1_block2" -> "stage1", "inception4a" -> "inception4"."""
    match = re.match(r"[A-Za-z]+\d+", block)
    return match[0] if match else block


def _natural(path: tuple[str, ...]) -> list[Any]:
    """Returns a sort key that puts "block10" after "block9"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", "/".join(path))]


def read_gates(model: nn.Module, variables: Any, intermediates: dict[str, Any]) -> list[BlockGates]:
    """Returns the gates that the attentions sowed, in block order; empty for attentions without gates.

    Args:
        model: a network from `create_model`; its `attention` made the gates.
        variables: `params` and `batch_stats`.
        intermediates: the intermediates that the network sowed.
    """
    sown = flatten_dict(intermediates)
    blocks = []
    for path in sorted({path[:-1] for path in sown if path[-1] == "gate"}, key=_natural):
        gate = sown[*path, "gate"][0]
        if len(sown[*path, "gate"]) > 1 or np.ndim(gate) != 2:  # of an attention of one's own, not one per channel
            continue
        drive, bins, share = None, (), None
        own = {name: functools.reduce(lambda tree, key: tree.get(key, {}), path, variables[name])
               for name in variables}  # fmt: skip
        module = model.attention(gate.shape[-1])
        if isinstance(module, IdentityStart):
            module, share = module.attention(gate.shape[-1]), own["params"].get(SHARE)
            if np.shape(share) != gate.shape[-1:]:  # restore="features": the gate has other channels
                share = None
        if isinstance(module, HGA):
            (cells,) = sown[*path, "cells"]
            drive = np.asarray(cell_drive(module, own, cells))
            bins = tuple(module.bins) if module.hap else (1,)
        blocks.append(BlockGates(stage_of(path[0]), path[0], np.asarray(gate), drive, bins, share))
    return blocks


def preactivation(module: HGA, variables: Any, cells: jax.Array) -> jax.Array:
    """Returns the gates' pre-activations in inference: cells `[B, S, cells, C]`, as HGA sows them, -> `[B, A]`.

    The gate is the sigmoid of the result. Without `restore_norm`, which adds constants, the function is
    piecewise linear without a constant term.
    """
    params = variables["params"]
    if module.ee:
        # The output width follows from the given weights; `channels` only sizes new ones.
        ee = ExcitationExploration(cells.shape[-1], module.reduction, module.excitation, module.dtype)
        e = ee.apply({"params": params["ee"]}, cells)
    else:
        e = cells.sum(axis=1).mean(axis=1) / (len(module.kernels) if module.mfe else 1)
    if "restore" in params and module.restore == "gate":
        e = e @ params["restore"]["kernel"].astype(e.dtype)
    if "restore_norm" in params:
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-5, dtype=module.dtype)
        own = {name: variables[name]["restore_norm"] for name in ("params", "batch_stats")}
        e = norm.apply(own, e)
    return e


@functools.partial(jax.jit, static_argnums=0)
def cell_drive(module: HGA, variables: Any, cells: jax.Array) -> jax.Array:
    """Returns each cell's contribution to each gate's pre-activation: `[B, S, cells, C]` -> `[B, cells, A]`.

    The contribution is gradient x input, the derivative in the direction of the cell's own values. Since nothing
    between cells and gate has a constant term (except `restore_norm`), the contributions add up to exactly the
    pre-activation, by Euler's theorem on homogeneous functions.
    """

    def part(cell: jax.Array) -> jax.Array:
        own = cells * (jnp.arange(cells.shape[2]) == cell)[:, None]
        return jax.jvp(lambda cells: preactivation(module, variables, cells), (cells,), (own,))[1]

    return jnp.moveaxis(jax.vmap(part)(jnp.arange(cells.shape[2])), 0, 1)


def cell_shares(blocks: list[BlockGates]) -> np.ndarray:
    """Returns how much each cell drives the gates of the given blocks: `[B, cells]`, shares that add up to 1.

    A cell's strength is the mean absolute contribution over the gates. Strengths are summed over the blocks, so
    a block whose gates hardly move counts little. If no cell contributes, for example after a ReLU that passes
    nothing, the shares are 0.
    """
    strength = sum(np.abs(block.drive).mean(axis=-1) for block in blocks)
    whole = strength.sum(axis=-1, keepdims=True)
    return np.divide(strength, whole, out=np.zeros_like(strength), where=whole > 0)


def split_cells(values: np.ndarray, bins: tuple[int, ...]) -> list[np.ndarray]:
    """Splits `[cells]` into the grids `[j, j]`, one for each j in `bins`."""
    ends = np.cumsum([j * j for j in bins])
    return [part.reshape(j, j) for j, part in zip(bins, np.split(values, ends[:-1]), strict=True)]
