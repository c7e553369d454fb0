"""The folder of a run: what lies where, and reading it back.

config.json       the whole configuration          checkpoints/   Orbax
dataset.json      classes and their names          tensorboard/   event files
metrics.jsonl     one JSON object per logged line  parameters.txt every parameter, its shape and statistics
initial_weights.txt  what a run with init.weights began with
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

from ml_collections import ConfigDict

from hga_flax.config.loading import differences, from_json, to_json
from hga_flax.config.rules import complete
from hga_flax.data.sources import FOLDER, DatasetInfo, other_data
from hga_flax.errors import UserError, expand, one_line

# Whatever these say, a checkpoint's arrays are those of one network, and of one beginning.
MODEL_KEYS = ("model.name", "model.options", "model.attention", "model.attention_options", "data.name", "init.weights")
CLAIM = ".trained_by"  # says who trains in a folder of this machine; see locks.py


def open_workdir(path: str) -> pathlib.Path:
    """Creates the folder where it is missing and makes sure that it can be written to.

    Raises:
        UserError: it cannot.
    """
    if not path:
        raise UserError("--workdir is empty; name the folder of the run")
    workdir = expand(path, "--workdir").absolute()
    try:
        _check_way(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        # Under a name of its own: the processes of a run do this at once.
        file, probe = tempfile.mkstemp(prefix=".writable-", dir=workdir)
        os.close(file)
        os.unlink(probe)
    except OSError as error:
        raise UserError(
            f"--workdir={path} cannot be written to: {error.strerror or one_line(error)}; choose another folder"
        ) from None
    return workdir


def _check_way(workdir: pathlib.Path) -> None:
    """Raises an OSError that names what on the way to a folder, or in its place, is no folder."""
    for part in (*reversed(workdir.parents), workdir):
        if part.is_symlink() and not part.exists():
            raise OSError(0, f"{part} is a link to {os.readlink(part)}, which does not exist")
        if part.exists() and not part.is_dir():
            raise OSError(0, f"{part} is a file, not a folder")


def check_same_run(workdir: pathlib.Path, config: ConfigDict) -> list[str]:
    """Returns how the configuration differs from the one the workdir was started with.

    Raises:
        UserError: the workdir belongs to another model or data set.
    """
    if not (workdir / "config.json").exists():
        return []
    changed = differences(read_config(workdir), config)
    for change in changed:
        key, _, values = change.partition(": ")
        if key in MODEL_KEYS:
            old, _, new = values.partition(" -> ")
            raise UserError(
                f"--workdir={workdir} belongs to another run: there {key} is '{old}', here '{new}'; "
                "choose another --workdir"
            )
    return changed


def absolute_paths(config: ConfigDict) -> ConfigDict:
    """Returns a copy whose `data.dir` and `training.compilation_cache` mean the same seen from any folder.

    Addresses of buckets, paths from `~` and empty ones are left as they are.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for group, name in (("data", "dir"), ("training", "compilation_cache")):
            path = config[group][name]
            if path and "://" not in path and not path.startswith("~"):
                config[group][name] = os.path.abspath(path)
    return config


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """Returns the configuration that a workdir was last trained with.

    Raises:
        UserError: the workdir holds none, or it cannot be read.
    """
    file = workdir / "config.json"
    try:
        return complete(from_json(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        why = "it is a file, not a folder" if workdir.is_file() else "there is no config.json"
        raise UserError(f"{workdir}: no run here ({why})") from None
    except (OSError, ValueError, UserError) as error:  # ValueError: no text at all
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes config.json."""
    write_text(workdir / "config.json", to_json(config) + "\n")


def write_dataset(workdir: pathlib.Path, info: DatasetInfo) -> None:
    """Writes dataset.json, unless it is there: the labels of a run mean what they meant when it began."""
    if not (workdir / "dataset.json").exists():
        write_text(workdir / "dataset.json", json.dumps(dataclasses.asdict(info)) + "\n")


def check_same_data(workdir: pathlib.Path, info: DatasetInfo) -> list[str]:
    """Compares data with those that a workdir was begun with.

    Args:
        workdir: of the run.
        info: of the data as they are now, with the sizes of the splits in use.

    Returns:
        A sentence for each split that has another size now; the training split's is compared with the checkpoint's.

    Raises:
        UserError: the classes are others, or in another order.
    """
    if not (workdir / "dataset.json").exists():
        return []
    run = read_dataset(workdir)
    if other := other_data(run, info, "the data set" if info.name != FOLDER else "the folder"):
        raise UserError(f"--workdir={workdir}: {other}; bring back the classes, or choose another --workdir")
    return [
        f"the split '{split}' has {now:,} examples, and had {run.num_examples[split]:,} when the run began"
        for split, now in info.num_examples.items()
        if run.num_examples.get(split, now) != now
    ]


def read_dataset(workdir: pathlib.Path) -> DatasetInfo:
    """Returns what a workdir knows of its data set.

    Raises:
        UserError: it cannot be read.
    """
    try:
        fields = json.loads((workdir / "dataset.json").read_text())
        info = DatasetInfo(**{**fields, "class_names": tuple(fields["class_names"])})
        numbers = (info.num_classes, info.channels, *info.num_examples.values())
        if not isinstance(info.name, str) or any(type(n) is not int or not 0 < n < 2**31 for n in numbers):
            raise ValueError("it is not the description of a data set")
        return info
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{workdir / 'dataset.json'} cannot be read: {one_line(error)}") from None


@contextlib.contextmanager
def writing(file: pathlib.Path) -> Iterator[None]:
    """Turns an error of the file system inside (disk full, no right to write) into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror or one_line(error)}; the checkpoints are kept, and the same "
            "command goes on from the newest"
        ) from error


def write_text(file: pathlib.Path, text: str) -> None:
    """Replaces a file in one move, so that a kill leaves the old one or the new one.

    Raises:
        UserError: it cannot be written.
    """
    scratch = file.with_name(f".{file.name}.new")
    with writing(file):
        scratch.write_text(text)
        scratch.replace(file)
