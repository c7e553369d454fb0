"""Where examples come from: the digits, TFDS data sets, packed data sets, folders of images, synthetic images.

A source is a random-access sequence of `{"image": bytes | uint8 [H, W, C], "label": int}`, with a
"file_name" where files have names, so that the order of training is a pure function of (seed, epoch, index).
"""

import dataclasses
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from hga_flax.data.folder import FolderSource, class_names
from hga_flax.errors import UserError, nearest, one_line

FOLDER = "folder"  # the data.name of a folder of images, data.dir


class Source(Protocol):
    """Random access to labelled images, encoded or decoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What the rest of the code must know of a data set."""

    name: str
    num_classes: int
    channels: int
    class_names: tuple[str, ...]


class SyntheticSource:
    """Random images whose class shows in their mean colour; a pure function of the index.

    Args:
        examples: length of the source.
        size: height and width of the images.
        info: the data set that is imitated.
    """

    def __init__(self, examples: int, size: int, info: DatasetInfo):
        self._examples, self._size, self._info = examples, size, info

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.Generator(np.random.Philox(key=index))
        label = int(random.integers(self._info.num_classes))
        noise = random.integers(0, 128, (self._size, self._size, self._info.channels), dtype=np.uint8)
        colour = np.random.Generator(np.random.Philox(key=label)).integers(0, 128, self._info.channels, dtype=np.uint8)
        return {"image": noise + colour, "label": label}


def data_directory(directory: str) -> pathlib.Path:
    """Returns `directory`, or TFDS's own default (`$TFDS_DATA_DIR`, `~/tensorflow_datasets`) for ""."""
    return pathlib.Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _tfds() -> Any:
    import tensorflow_datasets as tfds  # kept out of the module: --help and synthetic runs do without

    return tfds


def _builder(name: str, directory: str) -> Any:
    """Returns the TFDS builder of a data set, prepared or not."""
    tfds = _tfds()
    try:
        if name == "digits":
            from hga_flax.data.digits import prepare_digits

            return tfds.builder_from_directory(str(prepare_digits(data_directory(directory))))
        return tfds.builder(name, data_dir=str(data_directory(directory)), file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        packed = packed_datasets(data_directory(directory))
        if name in packed:
            return tfds.builder_from_directory(str(packed[name]))
        known = ["digits", FOLDER, *packed, *tfds.list_builders(with_community_datasets=False)]
        raise UserError(f"data.name: there is no data set '{name}'{nearest(name, known)}") from None
    except OSError as error:
        raise UserError(f"data.dir: cannot use {data_directory(directory)}: {one_line(error)}") from None


def packed_datasets(data_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the folders of the data sets that lie in `data_dir` complete, by name (the last of several versions)."""
    found = sorted(data_dir.glob("[a-z]*/[0-9]*.[0-9]*.[0-9]*/dataset_info.json"))
    return {file.parent.parent.name: file.parent for file in found}


def dataset_info(name: str, directory: str = "") -> DatasetInfo:
    """Returns what is known of a data set; a TFDS data set need not be prepared for it.

    Raises:
        UserError: unknown name, or the data set is not one of labelled images.
    """
    if name == FOLDER:
        return DatasetInfo(name, len(names := class_names(folder_root(directory))), 3, names)
    features = _builder(name, directory).info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
        raise UserError(f"data.name: '{name}' is not an image classification data set (no 'image' and 'label')")
    names = tuple(features["label"].names or ())
    return DatasetInfo(name, int(features["label"].num_classes), int(features["image"].shape[-1]), names)


def folder_root(directory: str) -> pathlib.Path:
    """Returns the folder of images that `data.dir` names."""
    if not directory:
        raise UserError("data.dir: name the folder of images, which holds train/CLASS/ and val/CLASS/")
    return pathlib.Path(directory).expanduser()


def open_source(name: str, split: str, directory: str = "") -> Source:
    """Opens a split of a prepared data set, images as encoded bytes.

    Args:
        name: "digits" (prepared on first use), "folder", or the name of a TFDS or packed data set.
        split: in TFDS's notation, for example "train", "train[:90%]".
        directory: TFDS's data directory, "" for its default.

    Raises:
        UserError: the data set or the split does not exist here.
    """
    if name == FOLDER:
        return FolderSource(folder_root(directory), split)
    tfds = _tfds()
    builder = _builder(name, directory)
    if not builder.info.splits:
        raise UserError(
            f"data.name: {name} is not prepared in {data_directory(directory)}; run python -m hga_flax prepare "
            f"{name} --data-dir={data_directory(directory)}, name another data.dir, or try data.fake=true"
        )
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise UserError(f"data set {name} has no split '{split}' ({one_line(error)}); it has: {splits}") from None
    except NotImplementedError:
        raise UserError(
            f"{name} in {data_directory(directory)} is not in array_record format; prepare it again: "
            f"python -m hga_flax prepare {name} --data-dir=ANOTHER"
        ) from None
