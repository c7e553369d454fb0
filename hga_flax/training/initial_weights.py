"""The weights that a new run starts from (`init.from`): another run's, or a PyTorch file's.

What the file holds is brought under our names and fitted to the network by three rules. An attention,
a head ("classifier") and an auxiliary head are taken whole or stay fresh: the file may have another
one, or none. Everything else must be on both sides with the same shape, or it is another network. A stem for
another number of input channels is adapted as in timm (adapt_input_conv): summed over the channels
for one, repeated and divided where the file has one.
"""

import contextlib
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from hga_flax.attention.identity_start import SHARE
from hga_flax.errors import UserError, called, expand
from hga_flax.models.torch_files import read_torch_file
from hga_flax.models.torch_weights import find_peer, renamed
from hga_flax.storage import fetch_file, is_remote
from hga_flax.training import workdir as files
from hga_flax.training.checkpoints import Checkpoints
from hga_flax.training.mesh import replicate
from hga_flax.training.restore import choose_step
from hga_flax.training.state import TrainState
from hga_flax.training.twin import find

Path = tuple[str, ...]  # ("params", "stem_conv", "kernel")
KEY = "init.from"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".safetensors")
HEAD = "classifier"  # the name of every network's last layer, and of its auxiliary heads' last ones
OPTIONAL_THERE = re.compile(r"(^|\.)(se|fc|classifier|aux\d?)\.")  # in the names of PyTorch's libraries
SHOWN = 4  # names on the terminal


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file holds.

    Attributes:
        origin: what it is, for people.
        arrays: under our names.
        others: names that are no place in any network of ours.
        remedy: what would make a network that they fit.
    """

    origin: str
    arrays: Mapping[Path, np.ndarray]
    others: tuple[str, ...] = ()
    remedy: str = "set config.model to the network that they belong to"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What of a source fits a network.

    Attributes:
        origin: see `Source`.
        loaded: the arrays, by their places in the network.
        fresh: names that the network has and the source lacks, or has in another shape.
        unused: names of which it is the other way round.
        notes: what was changed on the way.
    """

    origin: str
    loaded: Mapping[Path, np.ndarray]
    fresh: list[str]
    unused: list[str]
    notes: list[str]

    def _lists(self) -> list[tuple[str, str, list[str]]]:
        size = sum(array.size for array in self.loaded.values())
        return [
            ("loaded", f"{size:,} values in {len(self.loaded):,} arrays", [_name(path) for path in self.loaded]),
            ("fresh", f"{len(self.fresh):,} arrays keep their initial values", self.fresh),
            ("unused", f"{len(self.unused):,} arrays of the source", self.unused),
        ]

    def rows(self) -> list[tuple[str, str]]:
        """Returns what a run prints: (name, value) rows."""
        rows = [("from", self.origin)]
        rows += [(kind, f"{count}: {_listed(names)}" if names else "none") for kind, count, names in self._lists()]
        return rows + [("changed", note) for note in self.notes]

    def text(self) -> str:
        """Returns the same with every name."""
        lines = [f"from {self.origin}", *self.notes]
        for kind, count, names in self._lists():
            lines += ["", f"{kind}: {count}", *(f"  {name}" for name in names)]
        return "\n".join(lines) + "\n"


def start_from(config: ConfigDict, state: TrainState, mesh: jax.sharding.Mesh) -> tuple[TrainState, Fitted]:
    """Returns the initial state with the weights of `init.from` in it, and what was loaded.

    Raises:
        UserError: they cannot be read, or are another network's.
    """
    fitted = fit_weights(config, state)
    placed = replicate(dict(fitted.loaded), mesh)
    return _with_variables(state, unflatten_dict(_places(state) | placed)), fitted


def fit_weights(config: ConfigDict, state: TrainState) -> Fitted:
    """Reads the weights of `init.from` and fits them to a network.

    Args:
        config: of the new run.
        state: initial, or abstract.

    Raises:
        UserError: they cannot be read, or are another network's.
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
    # The average begins as the weights do; copied, for a step consumes the state's arrays.
    ema = jax.tree.map(jnp.copy, {"params": state.params, "batch_stats": batch_stats})
    return dataclasses.replace(state, ema=ema)


def read_source(config: ConfigDict, places: Iterable[Path]) -> Source:
    """Reads the run's folder or the PyTorch file that `init.from` names.

    Raises:
        UserError: it is neither, cannot be read, or belongs to a network that PyTorch's libraries do not have.
    """
    given = config.init["from"]
    path, checkpoint = _locate(given)
    if path.is_dir():
        return _read_run(given, path, checkpoint)
    if path.suffix not in TORCH_SUFFIXES:
        wanted = f"name a run's folder (DIR, DIR@latest, DIR@STEP) or a file ({', '.join(TORCH_SUFFIXES)})"
        raise UserError(f"{KEY}={given}: {'no weights' if path.exists() else 'there is no such'}; {wanted}")
    tensors = read_torch_file(path)
    try:
        peer = find_peer(config.model.name, tensors)
    except ValueError as error:
        raise UserError(f"{KEY}={given}: {error}") from None
    arrays, others = renamed(peer, tensors, places)
    return Source(f"{given}, read as torchvision's or timm's {peer}", arrays, tuple(others))


def _locate(given: str) -> tuple[pathlib.Path, str]:
    """Returns where what `init.from` names lies on this machine, and which checkpoint of it if it is a run."""
    folder, at, checkpoint = given.rpartition("@")
    if is_remote(given):
        if given.endswith(TORCH_SUFFIXES):
            return fetch_file(given, KEY), ""
        return (find(folder, KEY), checkpoint) if at else (find(given, KEY), "best")
    path = expand(given, KEY)
    if not path.exists() and at and expand(folder, KEY).is_dir():
        return expand(folder, KEY), checkpoint
    return path, "best"


def _read_run(given: str, folder: pathlib.Path, checkpoint: str) -> Source:
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{KEY}={given}: {folder} is not a run's folder (there are no checkpoints)")
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        if not checkpoints.steps():
            raise UserError(f"{KEY}={given}: no checkpoint here yet")
        if checkpoint == "best" and checkpoints.best_step() is None:
            raise UserError(f"{KEY}={given}: none of its checkpoints was evaluated; name {folder}@latest")
        step = choose_step(checkpoints, checkpoint, given, f"{KEY}={given}")
        arrays = flatten_dict(checkpoints.restore_weights(step))
    finally:
        checkpoints.close()
    origin = called(f"step {step} of {folder}")
    with contextlib.suppress(UserError):  # the arrays speak for themselves
        model = files.read_config(folder).model
        origin += f", {model.name} with attention {model.attention}"
        flags = {"name": model.name} | ({"options": model.options} if model.options else {})
        remedy = " ".join(shlex.quote(f"--config.model.{key}={value}") for key, value in flags.items())
        return Source(origin, arrays, remedy=f"{remedy} makes the network that they belong to")
    return Source(origin, arrays)


def fit(source: Source, places: Mapping[Path, Any], network: str) -> Fitted:
    """Fits a source to a network.

    Args:
        source: what a file holds.
        places: the network's variables, or their shapes.
        network: what messages call it.

    Raises:
        UserError: the source is another network's, or holds values that are not finite.
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
        if array is not None and path[1].startswith("stem") and array.shape != place.shape:
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
        raise UserError(
            f"{KEY}={source.origin}: these are not the weights of {network}: {_listed(problems)}; {source.remedy}"
        )
    for paths in optional.values():
        loaded |= _whole(paths, source.arrays, places, notes)
    loaded = {path: np.asarray(loaded[path], np.float32) for path in places if path in loaded}
    broken = [_name(path) for path, array in loaded.items() if not np.isfinite(array).all()]
    if broken:
        raise UserError(f"{KEY}={source.origin}: values that are not finite: {_listed(broken)}")
    unused = [_name(path) for path in source.arrays if path not in loaded] + list(source.others)
    return Fitted(source.origin, loaded, [_name(path) for path in places if path not in loaded], unused, notes)


def _optional_group(path: Path) -> Path:
    """Returns what of the network is loaded whole or not at all, () for what must be there."""
    for i, part in enumerate(path):
        if part in ("attention", HEAD):
            return path[1 : i + 1]
    return path[1:2] if path[1].startswith("auxiliary") else ()


def _whole(
    paths: list[Path], arrays: Mapping[Path, np.ndarray], places: Mapping[Path, Any], notes: list[str]
) -> dict[Path, np.ndarray]:
    """Returns a group's arrays if the source has them all in their shapes, else none."""
    needed = [path for path in paths if path[-1] != SHARE]
    if not needed or any(path not in arrays or arrays[path].shape != places[path].shape for path in needed):
        return {}
    group = {path: arrays[path] for path in needed}
    for path in paths:
        if path[-1] == SHARE:  # the source's attention acts wholly unless it says another share
            group[path] = arrays.get(path, np.ones(places[path].shape))
            if path not in arrays:
                notes.append(f"{_name(path)}: 1, for the source's attention acts wholly")
    return group


def _fit_channels(kernel: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """Returns a stem's kernel `[h, w, C, F]` for the input channels of `shape`, where one of the two has one."""
    have, want = kernel.shape[2] if kernel.ndim == 4 else 0, shape[2] if len(shape) == 4 else 0
    if have and want == 1:
        return kernel.sum(axis=2, keepdims=True), f"its {have} input channels summed to 1"
    if have == 1 and want:
        return np.repeat(kernel, want, axis=2) / want, f"its input channel repeated {want} times, and divided"
    return kernel, "not adapted"


def _name(path: Path) -> str:
    return "/".join(path[1:])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
