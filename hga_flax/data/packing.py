"""Writes images as TFDS data sets in array_record files, without TensorFlow; they can then be read by name."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import Progress

from hga_flax.errors import UserError, one_line
from hga_flax.storage.locks import lock

# TFDS would look up every unprepared data set in its bucket. It has switched the bucket off, but each look-up still
# leaves an empty folder in the system's temporary folder.
tfds.core.DatasetInfo.initialize_from_bucket = lambda self: None

VERSION = "1.0.0"
LEFTOVER = re.compile(r"\.preparing-\w+|incomplete\.\w+_\d+\.\d+\.\d+")  # our unfinished folders, and TFDS's
SPLIT = re.compile(r"(?!all$)[\w-]+")  # what TFDS can read back; "all" means the sum of the splits
SECONDS_BETWEEN_LINES = 10.0  # of progress, if stderr is not a terminal
# Yields a split's examples for TFDS: (key, {"image": bytes or uint8 [H, W, C], "label": class, "file_name": str}).
Examples = Callable[[], Iterator[tuple[int | str, dict[str, Any]]]]


class _Packed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of the examples that it is given."""

    def __init__(self, name: str, version: str, features: dict[str, Any], splits: dict[str, Examples], data_dir: str):
        self.name, self.VERSION = name, tfds.core.Version(version)
        self._features, self._splits = features, splits
        super().__init__(data_dir=data_dir, version=version, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}, packed by hga_flax.",
            features=tfds.features.FeaturesDict(self._features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split, examples) for split, examples in self._splits.items()}

    def _generate_examples(self, split: str, examples: Examples) -> Iterator:
        for key, example in counted(examples(), f"{split} examples"):
            image = example["image"]
            # TFDS would need TensorFlow to encode an array.
            data = cv2.imencode(".png", image[..., ::-1])[1].tobytes() if isinstance(image, np.ndarray) else image
            yield key, example | {"image": io.BytesIO(data)}


def counted(items: Iterator[Any], what: str) -> Iterator[Any]:
    """Yields the items and reports their number on stderr: live on a terminal, else in a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(*Progress.get_default_columns()[:1], "{task.completed:,}", console=console) as progress:
            yield from progress.track(items, total=None, description=what)
        return
    count, said = 0, time.monotonic()
    for item in items:
        count += 1
        yield item
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            print(f"{what}: {count:,} so far", file=sys.stderr, flush=True)
            said = time.monotonic()
    print(f"{what}: {count:,}", file=sys.stderr, flush=True)


def pack(
    name: str,
    splits: dict[str, Examples],
    class_names: Sequence[str],
    shape: tuple[int | None, int | None, int],
    data_dir: pathlib.Path,
    version: str = VERSION,
    *,
    file_names: bool = False,
) -> pathlib.Path:
    """Writes a data set; a rename gives it its name when it is complete.

    Args:
        name: name by which the data set is read afterwards.
        splits: for each split, a function that yields its examples.
        class_names: class names by label.
        shape: (H, W, C) of the images; None for H and W if they vary.
        data_dir: folder of TFDS data sets.
        version: version of the data set.
        file_names: whether the examples also have a "file_name".

    Returns:
        The folder of the data set.

    Raises:
        UserError: a split has a name that could not be read back.
        OSError: the files cannot be written.
    """
    for split in splits:
        if not SPLIT.fullmatch(split):
            raise UserError(f"'{split}' cannot name a split; use letters, digits, _ and -, and not 'all': rename it")
    features: dict[str, Any] = {
        "image": tfds.features.Image(shape=shape, encoding_format=None if shape[0] is None else "png"),
        "label": tfds.features.ClassLabel(names=list(class_names)),
    }
    if file_names:
        features["file_name"] = tfds.features.Text()

    def write(scratch: pathlib.Path) -> None:
        tfds.disable_progress_bar()  # it shows the scratch folder, and redrawing it fills logs
        # TFDS's messages show the scratch folder too.
        with contextlib.redirect_stdout(io.StringIO()), full_disk_as_os_error():
            _Packed(name, version, features, splits, str(scratch)).download_and_prepare()

    return write_once(data_dir, name, version, write)


@contextlib.contextmanager
def full_disk_as_os_error() -> Iterator[None]:
    """Turns array_record's RuntimeError for a disk that does not take its files into an OSError."""
    try:
        yield
    except RuntimeError as error:
        failed = re.search(r"(?:write|open|close)\(\) failed: ([^;]+)", str(error))
        raise (OSError(one_line(failed[1])) if failed else error) from None


def write_once(data_dir: pathlib.Path, name: str, version: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Makes `write(scratch)` prepare `scratch/name/version`, and moves that to `data_dir/name/version`.

    A killed preparation leaves nothing that looks complete, and the next one starts over. If two processes
    prepare at once, both use the files of the one that finishes first.
    """
    target = data_dir / name / version
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=".preparing-", dir=target.parent))
    try:
        write(scratch)
        try:
            os.rename(scratch / name / version, target)
        except OSError:
            if not target.exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def locked(data_dir: pathlib.Path, name: str) -> Iterator[None]:
    """Lets only one command at a time prepare `name`, and removes the leftovers of killed ones.

    Raises:
        UserError: another command is preparing it, or the folder cannot be written to.
    """
    folder = data_dir / name
    try:
        held = lock(folder / ".lock", wait=False)
    except OSError as error:
        raise UserError(f"--data-dir={data_dir} cannot be written to: {error.strerror or one_line(error)}") from None
    if held is None:
        raise UserError(f"another command is preparing {name} in {data_dir}")
    with held:
        for leftover in os.listdir(folder):
            if LEFTOVER.fullmatch(leftover):  # the folder may also hold the images to pack
                shutil.rmtree(folder / leftover, ignore_errors=True)
        try:
            yield
        except OSError as error:
            raise UserError(f"preparing {name} in {data_dir} failed: {error.strerror or one_line(error)}") from None


def check_name(name: str) -> str:
    """Returns `name` if it is valid for a packed data set.

    Raises:
        UserError: the name is invalid or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--name={name}: use lowercase letters, digits and _, starting with a letter")
    if name in ("digits", "folder", "arrays", "idx"):
        raise UserError(f"--name={name}: this name is reserved; choose another")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"--name={name}: a data set of that name already exists; choose another")
    return name
