"""Fits the weights of another run or of a PyTorch file to a network, for a new run to start from (`init.weights`).

The arrays of the file get our names and are fitted to the network by three rules. An attention, a head ("classifier")
or an auxiliary head is loaded whole or keeps its initial values, because the file may have another one or none.
Everything else must exist on both sides with the same shape; otherwise the weights belong to another network. A stem
for other input channels is adapted as in timm: summed over the channels if the network has one, repeated and divided
if the file has one.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from hga_flax.attention.identity_start import SHARE
from hga_flax.errors import UserError
from hga_flax.pretrained.file_kinds import listed
from hga_flax.pretrained.torch_names import wrapped_advice
from hga_flax.processes.mesh import replicate
from hga_flax.training.state import TrainState
from hga_flax.training.weights_source import Path, Source, read_source

HEAD = "classifier"  # name of the last layer of every network and of its auxiliary heads
OPTIONAL_THERE = re.compile(r"(^|\.)(se|fc|linear|classifier|aux\d?|attention)\.")  # in names of other libraries


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The result of fitting a source to a network.

    Attributes:
        origin: see `Source`.
        loaded: loaded arrays, by their paths in the network.
        fresh: names of the network's arrays that keep their initial values.
        unused: names of the source's arrays that were not loaded.
        notes: changes made to loaded arrays.
        chosen: see `Source`.
    """

    origin: str
    loaded: Mapping[Path, np.ndarray]
    fresh: list[str]
    unused: list[str]
    notes: list[str]
    chosen: str = ""

    def _lists(self) -> list[tuple[str, str, list[str]]]:
        size = sum(array.size for array in self.loaded.values())
        return [
            ("loaded", f"{size:,} values in {len(self.loaded):,} arrays", [_name(path) for path in self.loaded]),
            ("fresh", f"{len(self.fresh):,} arrays keep their initial values", self.fresh),
            ("unused", f"{len(self.unused):,} arrays of the source", self.unused),
        ]

    def rows(self) -> list[tuple[str, str]]:
        """Returns the (name, value) rows that a run prints."""
        rows = [("from", self.origin)] + ([("taken", self.chosen)] if self.chosen else [])
        rows += [(kind, f"{count}: {listed(names)}" if names else "none") for kind, count, names in self._lists()]
        return rows + [("changed", note) for note in self.notes]

    def text(self) -> str:
        """Returns the same information with all names, for initial_weights.txt."""
        lines = [f"from {self.origin}", *([f"taken: {self.chosen}"] if self.chosen else []), *self.notes]
        for kind, count, names in self._lists():
            lines += ["", f"{kind}: {count}", *(f"  {name}" for name in names)]
        return "\n".join(lines) + "\n"


def start_from(
    config: ConfigDict, state: TrainState, mesh: jax.sharding.Mesh, fitted: Fitted | None = None
) -> tuple[TrainState, Fitted]:
    """Loads the weights of `init.weights` into the initial state; returns the state and what was loaded.

    Args:
        config: configuration of the new run.
        state: initial state of the new run.
        mesh: device mesh.
        fitted: result of `fit_weights`, if already computed.

    Raises:
        UserError: the weights cannot be read, or belong to another network.
    """
    fitted = fitted or fit_weights(config, state)
    placed = replicate(dict(fitted.loaded), mesh)
    return _with_variables(state, unflatten_dict(_places(state) | placed)), fitted


def fit_weights(config: ConfigDict, state: TrainState) -> Fitted:
    """Reads the weights of `init.weights` and fits them to a network.

    Args:
        config: configuration of the new run.
        state: initial state, or an abstract one.

    Raises:
        UserError: the weights cannot be read, or belong to another network.
    """
    places = _places(state)
    source = read_source(config, places)
    fitted = fit(source, places, config.model.name)
    own = tuple(config.data.mean), tuple(config.data.std)
    if source.normalisation in (None, own):
        return fitted
    told = lambda mean, std: f"data.mean={mean}, data.std={std}"
    note = f"the images: these weights were trained with {told(*source.normalisation)}; this run has {told(*own)}"
    return dataclasses.replace(fitted, notes=[*fitted.notes, note])


def _places(state: TrainState) -> dict[Path, Any]:
    return flatten_dict({"params": state.params, "batch_stats": state.batch_stats})


def _with_variables(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    batch_stats = variables.get("batch_stats", state.batch_stats)
    state = dataclasses.replace(state, params=variables["params"], batch_stats=batch_stats)
    if state.ema is None:
        return state
    # The average starts at the same weights; copied, because a step donates the state's arrays.
    ema = jax.tree.map(jnp.copy, {"params": state.params, "batch_stats": batch_stats})
    return dataclasses.replace(state, ema=ema)


def fit(source: Source, places: Mapping[Path, Any], network: str) -> Fitted:
    """Fits a source to a network.

    Args:
        source: contents of a file of weights or of a checkpoint.
        places: the network's variables or their shapes, by path.
        network: name of the network in messages.

    Raises:
        UserError: the source belongs to another network, or its values are not real numbers or not finite.
    """
    loaded: dict[Path, np.ndarray] = {}
    notes: list[str] = []
    optional: dict[Path, list[Path]] = {}
    problems: list[str] = []
    for path, place in places.items():
        group = _optional_group(path)
        if group:
            optional.setdefault(group, []).append(path)
            continue
        array = source.arrays.get(path)
        if array is not None and is_stem(path) and array.shape != place.shape:
            array, note = _fit_channels(array, place.shape)
            notes += [f"{_name(path)}: {note}"]
        if array is None or array.shape != place.shape:
            found = "missing" if array is None else f"{list(array.shape)} instead of {list(place.shape)}"
            problems.append(f"{_name(path)} {found}")
        else:
            loaded[path] = array
    foreign = [_name(path) for path in source.arrays if path not in places and not _optional_group(path)]
    foreign += [name for name in source.others if not OPTIONAL_THERE.search(name)]
    problems += [f"{name} has no place in it" for name in foreign]  # such as the blocks of a deeper network
    if problems:
        other = f"these are not the weights of {network}: {listed(problems)}"
        raise UserError(f"{source.key}={source.origin}: {other}; {wrapped_advice(foreign) or source.remedy}")
    for paths in optional.values():
        loaded |= _whole(paths, source.arrays, places, notes)
    started = {_optional_group(path) for path in source.arrays if path[-1] == SHARE and path not in places}
    if started & {_optional_group(path) for path in loaded}:
        raise UserError(
            f"{source.key}={source.origin}: only a share of its attention takes effect, and here all of it would; set "
            "identity_start=True in config.model.attention_options"
        )
    unreal = [f"{_name(p)} ({a.dtype})" for p, a in loaded.items() if not jnp.issubdtype(a.dtype, jnp.floating)]
    if unreal:
        raise UserError(
            f"{source.key}={source.origin}: values that are not real numbers, as in a quantised network: "
            f"{listed(unreal)}; give the weights that it was quantised from"
        )
    loaded = {path: np.asarray(loaded[path], np.float32) for path in places if path in loaded}
    broken = [_name(p) for p, a in loaded.items() if not np.isfinite(a).all() or (p[-1] == "var" and a.min() < 0)]
    if broken:
        what = "values that are not finite, or variances below 0"
        raise UserError(f"{source.key}={source.origin}: {what}: {listed(broken)}")
    unused = [_name(path) for path in source.arrays if path not in loaded] + list(source.others)
    fresh = [_name(path) for path in places if path not in loaded]
    return Fitted(source.origin, loaded, fresh, unused, notes, source.chosen)


def _optional_group(path: Path) -> Path:
    """Returns the group that an array is loaded with, all or nothing; () for an array that must be in the source."""
    for i, part in enumerate(path):
        if part in ("attention", HEAD):
            return path[1 : i + 1]
    return path[1:2] if path[1].startswith("auxiliary") else ()


def _whole(
    paths: list[Path], arrays: Mapping[Path, np.ndarray], places: Mapping[Path, Any], notes: list[str]
) -> dict[Path, np.ndarray]:
    """Returns a group's arrays if the source has all of them in the right shapes, else {}."""
    fits = {path: arrays[path] for path in paths if path in arrays and arrays[path].shape == places[path].shape}
    needed = {path for path in paths if path[-1] != SHARE}
    if not needed or not needed <= fits.keys():
        return {} if needed else fits  # an attention without other parameters has the shares alone
    group = {path: fits[path] for path in paths if path in needed}
    for path in paths:
        if path[-1] == SHARE:  # an attention saved without a share was applied in full: share 1
            group[path] = arrays.get(path, np.ones(places[path].shape))
            if path not in arrays:
                notes.append(f"{_name(path)}: 1, because the source's attention is applied in full")
    return group


def is_stem(path: Path) -> bool:
    """Returns whether an array belongs to a network's first layers, which take the images; VGG has no stem."""
    return path[1].startswith("stem") or path[1:3] == ("stage1", "conv1")


def _fit_channels(kernel: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """Adapts a stem kernel `[h, w, C, F]` to the channels of `shape` if either has one; returns it and a note."""
    have, want = kernel.shape[2] if kernel.ndim == 4 else 0, shape[2] if len(shape) == 4 else 0
    if have and want == 1:
        return kernel.sum(axis=2, keepdims=True, dtype=np.float32), f"its {have} input channels summed to 1"
    if have == 1 and want:
        repeated = np.repeat(kernel.astype(np.float32), want, axis=2)
        return repeated / want, f"its input channel repeated {want} times, and divided"
    return kernel, "not adapted"


def _name(path: Path) -> str:
    return "/".join(path[1:])
