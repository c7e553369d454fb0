"""Finds and reads the weights that `init.weights` or a command's `--weights` names: a run's or a file's."""

import contextlib
import dataclasses
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from hga_flax.errors import UserError, called, expand
from hga_flax.pretrained.cifar_weights import is_cifar
from hga_flax.pretrained.file_kinds import WEIGHTS, weights_layout
from hga_flax.pretrained.torch_files import check_weights_file, open_weights
from hga_flax.pretrained.torch_names import no_peer
from hga_flax.pretrained.torch_weights import find_peer, renamed
from hga_flax.runs import workdir as files
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.local_copy import find
from hga_flax.runs.manifest import read_again
from hga_flax.storage.buckets import Remote, fetch_file, is_remote
from hga_flax.training.restore import choose_step, warn

Path = tuple[str, ...]  # ("params", "stem_conv", "kernel")
KEY = "init.weights"
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
        normalisation: `data.mean` and `data.std` of a run; None if they are not known.
        weights: "ema" for a moving average of the weights, of a run or by its name in a file, else "raw".
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
    weights: str = "raw"
    normalisation: tuple[Any, Any] | None = None


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
        weights="ema" if choice.is_average else "raw",
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
    try:
        if not (folder / "checkpoints").is_dir():
            weights_layout(folder)
    except ValueError as error:
        problem = f"{folder} is not a run's folder (there are no checkpoints): {error}"
        raise UserError(f"{key}={given}: {problem}") from None


def _read_run(given: str, folder: pathlib.Path, checkpoint: str, key: str) -> Source:
    _check_run(given, folder, key)
    checkpoints = Checkpoints(folder, read_only=True, warn=warn)

    def read() -> tuple[int, str, dict[str, Any]]:
        if not checkpoints.steps():
            raise UserError(f"{key}={given}: no checkpoint here yet")
        if checkpoint == "best" and checkpoints.best_step() is None:
            raise UserError(f"{key}={given}: none of its checkpoints was evaluated; name {folder}@latest")
        step = choose_step(checkpoints, checkpoint, given, f"{key}={given}")
        return step, *checkpoints.restore_weights(step)

    try:
        step, weights, arrays = read_again(read)
    finally:
        checkpoints.close()
    origin, remedy = called(f"step {step} of {folder}"), Source.remedy
    normalisation = None
    with contextlib.suppress(UserError):  # the configuration only improves messages
        of_run = files.read_config(folder)
        model, normalisation = of_run.model, (tuple(of_run.data.mean), tuple(of_run.data.std))
        origin += f", {model.name} with attention {model.attention}"
        flags = {"name": model.name} | ({"options": model.options} if model.options else {})
        remedy = " ".join(shlex.quote(f"--config.model.{name}={value}") for name, value in flags.items())
        remedy += " builds the network that they belong to"
    origin += ", its moving average" if weights == "ema" else ""
    arrays = flatten_dict(arrays)
    return Source(origin, arrays, remedy=remedy, key=key, step=step, weights=weights, normalisation=normalisation)
