"""Loads the weights that a new run starts from (`init.weights`): from another run or a PyTorch file.

The arrays of the file get our names and are fitted to the network by three rules. An attention, a head
("classifier") or an auxiliary head is loaded completely or keeps its initial values, because the file may have
a different one or none. Everything else must exist on both sides with the same shape; otherwise the weights belong to
another network. A stem with a different number of input channels is adapted as in timm (adapt_input_conv): summed over
the channels if the network has one, repeated and divided if the file has one.
"""

import contextlib
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from hga_flax.attention.identity_start import SHARE
from hga_flax.errors import UserError, called, expand
from hga_flax.pretrained.cifar_weights import is_cifar
from hga_flax.pretrained.file_kinds import WEIGHTS, listed, weights_layout
from hga_flax.pretrained.torch_files import check_weights_file, open_weights
from hga_flax.pretrained.torch_names import no_peer, wrapped_advice
from hga_flax.pretrained.torch_weights import find_peer, renamed
from hga_flax.processes.mesh import replicate
from hga_flax.runs import workdir as files
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.local_copy import find
from hga_flax.storage.buckets import Remote, fetch_file, is_remote
from hga_flax.training.restore import choose_step, warn
from hga_flax.training.state import TrainState

Path = tuple[str, ...]  # ("params", "stem_conv", "kernel")
KEY = "init.weights"
HEAD = "classifier"  # name of the last layer of every network and of its auxiliary heads
OPTIONAL_THERE = re.compile(r"(^|\.)(se|fc|linear|classifier|aux\d?|attention)\.")  # in names of other libraries
WANTED = "name a run's folder (DIR, DIR@latest, DIR@STEP) or a file of weights (.pth, .safetensors, ...)"


@dataclasses.dataclass(frozen=True)
class Source:
    """Contents of a file of weights or of a run's checkpoint.

    Attributes:
        origin: description for messages.
        arrays: arrays by our names.
        others: names in the file that no network of ours has.
        remedy: how to get a network that the arrays fit.
        chosen: if several parts of the file fit, which one was taken, and how to choose another.
        key: flag or configuration key that named the file.
        peer: network whose names the file uses, see `Found`; None for our own.
        path: path of the file.
        step: step of a run's checkpoint; None for a file.
    """

    origin: str
    arrays: Mapping[Path, np.ndarray]
    others: tuple[str, ...] = ()
    remedy: str = "set config.model to the network that they belong to"
    chosen: str = ""
    key: str = KEY
    peer: str | None = None
    path: str = ""
    step: int | None = None


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


def check_source(config: ConfigDict, workdir: str | None) -> None:
    """Checks, before anything is built, that `init.weights` exists and can hold weights.

    Skipped for a run that resumes, which does not need it, and if the weights or the workdir are in a bucket.

    Raises:
        UserError: the path does not exist, or is neither a run nor a file of weights.
    """
    given = config.init.weights
    if not given or is_remote(given) or (workdir and is_remote(workdir)):
        return
    if workdir and files.has_checkpoints(expand(workdir, "--workdir")):
        return
    path, _ = locate(given, KEY)
    if path.is_dir():
        _check_run(given, path, KEY)
    else:
        check_weights_file(path)


def fit_weights(config: ConfigDict, state: TrainState) -> Fitted:
    """Reads the weights of `init.weights` and fits them to a network.

    Args:
        config: configuration of the new run.
        state: initial state, or an abstract one.

    Raises:
        UserError: the weights cannot be read, or belong to another network.
    """
    places = _places(state)
    return fit(read_source(config, places), places, config.model.name)


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


def read_source(config: ConfigDict, places: Mapping[Path, Any]) -> Source:
    """Reads the run's folder or the file of weights that `init.weights` names.

    Args:
        config: configuration of the new run.
        places: the network's variables or their shapes, by path.

    Raises:
        UserError: it is neither, cannot be read, or belongs to another network.
    """
    return read_weights(config.init.weights, config.model.name, places)


def read_weights(given: str, network: str, places: Mapping[Path, Any], key: str = KEY) -> Source:
    """Reads a run's folder or a file of weights.

    Args:
        given: DIR, DIR@latest, DIR@STEP, FILE, or FILE@KEY if several parts of a file fit.
        network: name of our network to load the weights into.
        places: the network's variables or their shapes, by path.
        key: name of `given` in messages.

    Raises:
        UserError: it is neither, cannot be read, or belongs to another network.
    """
    path, part = locate(given, key)
    if path.is_dir():
        return _read_run(given, path, part or "best", key)
    with open_weights(path) as contents:
        peer, choice, size = find_peer(network, contents, places, part)
        described = contents.describe()
        tensors = choice.arrays()
    if choice.score[1] * 4 <= size and peer is None:
        raise UserError(f"{key}={given}: {no_peer(network)}")
    if choice.score[1] * 4 <= size:  # few matches: by chance, or because of a few layers in common
        raise UserError(
            f"{key}={given}: these are not the weights of {network}: {choice.score[1]} of its {size} arrays have a "
            f"matching name; the file has {described}"
        )
    arrays, others = renamed(peer, tensors, places)
    label = f", its {choice.label}" if choice.label else ""
    return Source(
        f"{given}{label}, read as {_title(peer, network)}",
        arrays,
        tuple(others),
        remedy=f"the file has {described}; {_model_of(peer, arrays)}",
        chosen=choice.note(),
        key=key,
        peer=peer,
        path=str(path),
    )


def _model_of(peer: str | None, arrays: Mapping[Path, np.ndarray]) -> str:
    """Returns the advice for a network that the arrays do not fit."""
    if is_cifar(peer) and not any("downsample_conv" in path for path in arrays):
        return "its shortcuts have no parameters: set config.model.options to \"shortcut='A'\""
    return "set config.model to the network that they belong to"


def _title(peer: str | None, network: str) -> str:
    """Returns the name, for messages, of the network whose names a file uses."""
    if peer is None:
        return f"our {network}"
    return peer if is_cifar(peer) else f"torchvision's or timm's {peer}"


def locate(given: str, key: str) -> tuple[pathlib.Path, str]:
    """Returns the local path of a run or file of weights, and the part of it that was requested ("" for any).

    Raises:
        UserError: there is no such file or folder.
    """
    folder, at, part = given.rpartition("@")
    if is_remote(given):
        for address, part_of_it in [(given, ""), *([(folder, part)] if at else [])]:
            if WEIGHTS.search(address) or _is_remote_file(address, key):
                return fetch_file(address, key), part_of_it
        return (find(folder, key), part) if at else (find(given, key), "")
    path = expand(given, key)
    if not path.exists() and at and expand(folder, key).exists():
        return expand(folder, key), part
    if not path.exists():
        raise UserError(f"{key}={given}: there is no such file or folder; {WANTED}")
    return path, ""


def _is_remote_file(address: str, key: str) -> bool:
    folder, _, name = address.rpartition("/")
    return is_remote(folder) and Remote(folder, key).file(name) is not None


def _check_run(given: str, folder: pathlib.Path, key: str) -> None:
    if (folder / "checkpoints").is_dir():
        return
    problem = f"{folder} is not a run's folder (there are no checkpoints)"
    try:
        weights_layout(folder)
    except ValueError as error:
        raise UserError(f"{key}={given}: {problem}: {error}") from None


def _read_run(given: str, folder: pathlib.Path, checkpoint: str, key: str) -> Source:
    _check_run(given, folder, key)
    checkpoints = Checkpoints(folder, read_only=True, warn=warn)
    try:
        if not checkpoints.steps():
            raise UserError(f"{key}={given}: no checkpoint here yet")
        if checkpoint == "best" and checkpoints.best_step() is None:
            raise UserError(f"{key}={given}: none of its checkpoints was evaluated; name {folder}@latest")
        step = choose_step(checkpoints, checkpoint, given, f"{key}={given}")
        arrays = flatten_dict(checkpoints.restore_weights(step))
    finally:
        checkpoints.close()
    origin = called(f"step {step} of {folder}")
    with contextlib.suppress(UserError):  # the configuration only improves messages
        model = files.read_config(folder).model
        origin += f", {model.name} with attention {model.attention}"
        flags = {"name": model.name} | ({"options": model.options} if model.options else {})
        remedy = " ".join(shlex.quote(f"--config.model.{name}={value}") for name, value in flags.items())
        return Source(origin, arrays, remedy=f"{remedy} builds the network that they belong to", key=key, step=step)
    return Source(origin, arrays, key=key, step=step)


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
        return kernel.sum(axis=2, keepdims=True), f"its {have} input channels summed to 1"
    if have == 1 and want:
        return np.repeat(kernel, want, axis=2) / want, f"its input channel repeated {want} times, and divided"
    return kernel, "not adapted"


def _name(path: Path) -> str:
    return "/".join(path[1:])
