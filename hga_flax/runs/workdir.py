"""The folder of a run: its layout, and functions that read and write its files.

config.json       the whole configuration          checkpoints/   Orbax
dataset.json      classes and their names          tensorboard/   event files
metrics.jsonl     one JSON object per logged line  parameters.txt every parameter, its shape and statistics
initial_weights.txt  what a run with init.weights started from
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

from ml_collections import ConfigDict

from hga_flax.config.checks import complete
from hga_flax.config.loading import differences, from_json, parse_options, to_json
from hga_flax.data.sources import FOLDER, DatasetInfo, other_data
from hga_flax.errors import UserError, expand, one_line
from hga_flax.runs.local_copy import is_local_copy

# Fixed for a run: its checkpoints belong to one network, one data set and one set of initial weights.
MODEL_KEYS = ("model.name", "model.options", "model.attention", "model.attention_options")
MODEL_KEYS += ("data.name", "data.fake", "init.weights")
NEWEST = "newest_checkpoint.json"


def open_workdir(path: str) -> pathlib.Path:
    """Creates the folder if it is missing and checks that it is writable.

    Raises:
        UserError: the folder cannot be created or written to, or has a name in which checkpoints cannot be written.
    """
    if not path:
        raise UserError("--workdir is empty; name the folder of the run")
    workdir = expand(path, "--workdir").absolute()
    check_name(workdir)
    try:
        _check_way(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        # A unique name, because all processes of a run do this at the same time.
        file, probe = tempfile.mkstemp(prefix=".writable-", dir=workdir)
        os.close(file)
        os.unlink(probe)
    except OSError as error:
        raise UserError(
            f"--workdir={path} cannot be written to: {error.strerror or one_line(error)}; choose another folder"
        ) from None
    return workdir


def check_name(folder: pathlib.Path) -> None:
    """Raises a UserError for a path below which Orbax might write checkpoints that cannot be read."""
    if odd := sorted(set("[*?\\") & set(str(folder))):  # it looks for files by patterns that begin with the path
        raise UserError(
            f"{folder}: checkpoints may be lost below a path with {odd[0]}, which Orbax takes for a pattern; choose "
            "another folder, or rename this one"
        )
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        name = os.fsencode(folder)
        raise UserError(f"{name!r}: checkpoints need a path in UTF-8; choose another folder") from None


def _check_way(workdir: pathlib.Path) -> None:
    """Raises an OSError that names the first part of the path that exists but is not a folder."""
    for part in (*reversed(workdir.parents), workdir):
        if part.is_symlink() and not part.exists():
            raise OSError(0, f"{part} is a link to {os.readlink(part)}, which does not exist")
        if part.exists() and not part.is_dir():
            raise OSError(0, f"{part} is a file, not a folder")


def check_same_run(workdir: pathlib.Path, config: ConfigDict) -> list[str]:
    """Returns the differences from the configuration that the workdir was last trained with.

    Raises:
        UserError: the workdir belongs to a run of another model or data set, or with other initial weights, or its
            checkpoints were trained with another batch size, or on images normalised otherwise.
    """
    if not (workdir / "config.json").exists():
        # In a bucket's copy, the session that wrote the first checkpoint may have been killed before the upload.
        if has_checkpoints(workdir) and not is_local_copy(workdir):
            raise UserError(
                f"--workdir={workdir} holds checkpoints but no config.json, so nobody knows of which run; put it back, "
                "or choose another --workdir"
            )
        return []
    changed = differences(read_config(workdir), config)
    for change in changed:
        key, _, values = change.partition(": ")
        old, _, new = values.partition(" -> ")
        if key in MODEL_KEYS and not (key.endswith("options") and parse_options(old, key) == parse_options(new, key)):
            raise UserError(
                f"--workdir={workdir} belongs to another run: there {key} is '{old}', here '{new}'; "
                "choose another --workdir"
            )
        if key in ("data.mean", "data.std") and has_checkpoints(workdir):
            raise UserError(
                f"{change}: the checkpoints in {workdir} are of images with the old values. Keep these, or choose "
                f"another --workdir, with --config.init.weights={workdir} to start from its weights"
            )
        if key == "training.batch_size" and has_checkpoints(workdir):
            raise UserError(
                f"{change}: the schedule of the run in {workdir} counts steps of {values.partition(' -> ')[0]} images. "
                "Keep the size (training.accumulation_steps makes it fit in memory), or choose another --workdir, with "
                f"--config.init.weights={workdir} to start from its weights"
            )
    return changed


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Returns whether a workdir has a complete checkpoint."""
    folders = (workdir / "checkpoints", workdir / "superseded")
    return any(path.name.isdecimal() for folder in folders if folder.is_dir() for path in folder.iterdir())


def absolute_paths(config: ConfigDict) -> ConfigDict:
    """Returns a copy with `data.dir` and `training.compilation_cache` as absolute paths.

    Bucket addresses, paths that start with `~` and empty paths stay as they are.
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
        UserError: there is no config.json, or it cannot be read.
    """
    file = workdir / "config.json"
    try:
        return complete(from_json(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        why = "it is a file, not a folder" if workdir.is_file() else "there is no config.json"
        raise UserError(f"{workdir}: no run here ({why})") from None
    except (OSError, ValueError, UserError) as error:  # ValueError: not a text file
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes config.json."""
    write_text(workdir / "config.json", to_json(config) + "\n")


def write_dataset(workdir: pathlib.Path, info: DatasetInfo) -> None:
    """Writes dataset.json unless it exists: the labels of a run keep their original meaning."""
    if not (workdir / "dataset.json").exists():
        write_text(workdir / "dataset.json", json.dumps(dataclasses.asdict(info)) + "\n")


def check_same_data(workdir: pathlib.Path, info: DatasetInfo) -> list[str]:
    """Compares the data set with the one that a workdir was started with.

    Args:
        workdir: folder of the run.
        info: the data set as it is now, with the sizes of the splits in `num_examples`.

    Returns:
        One sentence per split that has changed. (The trainer also checks the training split's size against the
        checkpoint.)

    Raises:
        UserError: the classes or their order differ, or there are checkpoints and other files to train on.
    """
    if not (workdir / "dataset.json").exists():
        return []
    run = read_dataset(workdir)
    if other := other_data(run, info, "the data set" if info.name != FOLDER else "the folder"):
        raise UserError(f"--workdir={workdir}: {other}; restore the classes, or choose another --workdir")
    changed = run.changed(info)
    split = read_config(workdir).data.train_split if changed else ""
    if split in info.num_examples and has_checkpoints(workdir):
        of_split = run.changed(dataclasses.replace(info, num_examples={split: info.num_examples[split]}))
        if of_split and run.num_examples.get(split) == info.num_examples[split]:
            raise UserError(f"--workdir={workdir}: {of_split[0]}; restore the files, or choose another --workdir")
    return changed


def read_dataset(workdir: pathlib.Path) -> DatasetInfo:
    """Returns the description of a workdir's data set.

    Raises:
        UserError: dataset.json cannot be read.
    """
    try:
        fields = json.loads((workdir / "dataset.json").read_text())
        info = DatasetInfo(**{**fields, "class_names": tuple(fields["class_names"])})
        numbers = (info.num_classes, info.channels, *info.num_examples.values())
        if not isinstance(info.name, str) or any(type(n) is not int or not 0 < n < 2**31 for n in numbers):
            raise ValueError("it is not the description of a data set")
        if not all(isinstance(digest, str) for digest in info.digests.values()):
            raise ValueError("its digests are not text")
        if info.class_names and len(set(info.class_names)) != info.num_classes:
            raise ValueError(f"it does not name {info.num_classes} different classes")
        return info
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{workdir / 'dataset.json'} cannot be read: {one_line(error)}") from None


@contextlib.contextmanager
def writing(file: pathlib.Path) -> Iterator[None]:
    """Turns an OSError in this context (disk full, no permission) into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror or one_line(error)}; the checkpoints are kept, and the same "
            "command resumes from the newest"
        ) from error


def write_text(file: pathlib.Path, text: str) -> None:
    """Replaces a file atomically: a kill leaves either the old or the new content.

    Raises:
        UserError: the file cannot be written.
    """
    scratch = file.with_name(f".{file.name}.new")
    with writing(file):
        scratch.write_text(text)
        scratch.replace(file)


def entries(workdir: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Returns every checkpoint's (step, path), newest last; a superseded one comes before its replacement."""
    places = enumerate((workdir / "superseded", workdir / "checkpoints"))
    found = [(p, place) for place, folder in places if folder.is_dir() for p in folder.iterdir()]
    named = [(int(p.name), place, p) for p, place in found if p.name.isdecimal() and str(int(p.name)) == p.name]
    return [(step, path) for step, _, path in sorted(named)]


def newest_complete(workdir: pathlib.Path) -> int | None:
    """Returns the last step of which a checkpoint was complete in a workdir, though it may be gone since."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((workdir / NEWEST).read_text())["step"])
    return None


def write_newest_complete(workdir: pathlib.Path, step: int) -> None:
    """Records that the checkpoint of a step is complete."""
    write_text(workdir / NEWEST, json.dumps({"step": step}) + "\n")


def free_name(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a name in a folder, which is created, that nothing has yet: NAME, NAME.1, ..."""
    folder.mkdir(exist_ok=True)
    names = (folder / f"{name}{suffix}" for suffix in ("", *(f".{n}" for n in range(1, 1000))))
    return next(path for path in names if not path.exists())
