"""Sources of examples: the digits, TFDS data sets, packed data sets, folders of images, synthetic images.

A source is a random-access sequence of `{"image": bytes | uint8 [H, W, C], "label": int}`, with a "file_name" if
files have names. Random access makes the order of training a pure function of (seed, epoch, index).
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from hga_flax.data.classes import difference
from hga_flax.data.folder import FolderSource, class_names
from hga_flax.data.remote import local_directory
from hga_flax.errors import NO_THREAD, UserError, expand, nearest, one_line
from hga_flax.storage.buckets import is_remote

FOLDER = "folder"  # data.name if data.dir is a folder of images
CHANNELS = (1, 3)  # grey and RGB, which the decoder produces
# NAME[/CONFIG][:VERSION]. TFDS would take MyName for my_name, whose folder is not the one that `_check_features` reads.
TFDS_NAME = re.compile(r"[a-z][a-z0-9_]*(/[\w.-]+)?(:\d+\.\d+\.\d+)?")
# TFDS's errors for a set prepared in another format: a format that it knows by name, or any other.
OTHER_FORMAT = re.compile(r"File format (is already set to|array_record does not match the file formats in .*\['\w)")
# Records are read in the calling thread; in array_record's own threads, a single record takes twice as long.
READER = {"max_parallelism": "0"}
TFDS_FEATURES = "tensorflow_datasets.core.features."  # the package with the features that a data set may use


class Source(Protocol):
    """Random access to labelled images, encoded or decoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The facts about a data set that the rest of the code needs.

    Attributes:
        name: `data.name`.
        num_classes: number of classes.
        channels: number of channels of the images, 1 or 3.
        class_names: class names by label; empty if there are none.
        num_examples: number of examples in each split of a run, as recorded in its folder; empty if there is no run.
        digests: digest of the names and labels of the files in each split of a run on a folder of images.
    """

    name: str
    num_classes: int
    channels: int
    class_names: tuple[str, ...]
    num_examples: dict[str, int] = dataclasses.field(default_factory=dict, compare=False)
    digests: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def changed(self, now: "DatasetInfo") -> list[str]:
        """Returns one sentence for each split of the run that is another one `now`."""
        sentences = []
        for split, size in now.num_examples.items():
            before, digest = self.num_examples.get(split, size), now.digests.get(split)
            if before != size:
                sentences.append(f"the split '{split}' has {size:,} examples, and had {before:,} when the run began")
            elif self.digests.get(split, digest) != digest:
                sentences.append(f"the split '{split}' has files of other names or classes than when the run began")
        return sentences


class SyntheticSource:
    """Random images whose mean colour shows their class; a pure function of the index.

    Args:
        examples: length of the source.
        size: height and width of the images.
        info: classes and channels of the images.
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


class Records:
    """The examples of a TFDS data set in array_record files.

    Args:
        records: the records; read by index.
        folder: folder of the data set, for messages.
        parse: maps a record to an example. TFDS's own source yields examples, but it converts every feature to a NumPy
            array, which takes three times as long as reading the record and `_parse`.

    Raises:
        UserError: when read, a file of the data set is missing or damaged.
    """

    def __init__(self, records: Any, folder: str, parse: Callable[[Any], dict[str, Any]] = lambda record: record):
        self._records, self._folder, self._parse = records, folder, parse

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._damage_named():
            return self._parse(self._records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        with self._damage_named():
            return [self._parse(record) for record in self._records.__getitems__(indices)]

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        from google.protobuf.message import DecodeError

        try:
            yield
        except (RuntimeError, OSError, DecodeError) as error:
            raise UserError(
                f"data.dir: {self._folder} is damaged or incomplete, prepare it again: {one_line(error)}"
            ) from None


def _parse(record: bytes) -> dict[str, Any]:
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(record).features.feature
    images, labels = features["image"].bytes_list.value, features["label"].int64_list.value
    if not images or not labels:
        raise RuntimeError("a record has no image or no label")
    example = {"image": images[0], "label": labels[0]}
    if "file_name" in features:
        example["file_name"] = features["file_name"].bytes_list.value[0]
    return example


def data_directory(directory: str) -> pathlib.Path:
    """Returns `directory`, or for "" TFDS's default: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return expand(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "data.dir")


def _tfds() -> Any:
    from hga_flax.data.packing import tfds  # imported late: --help does not need it

    return tfds


def _here(name: str, directory: str) -> str:
    """Returns a data directory on this machine, after copying the set to it if it is in a bucket."""
    return local_directory(directory, name) if TFDS_NAME.fullmatch(name) else directory


@functools.cache
def _scratch() -> pathlib.Path:
    """Returns a temporary folder that is removed when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="hga_flax-")
    atexit.register(folder.cleanup)
    return pathlib.Path(folder.name)


def base_name(name: str) -> str:
    """Returns the NAME of NAME[/CONFIG][:VERSION]."""
    return re.split("[/:]", name)[0]


def open_builder(name: str, directory: str, key: str = "data.name", known: Sequence[str] = (FOLDER,)) -> Any:
    """Returns the TFDS builder of a data set, prepared or not.

    Args:
        name: "digits", or the name of a TFDS or packed data set.
        directory: TFDS's data directory, "" for its default.
        key: configuration key or command that named the set, for messages.
        known: further names to suggest.

    Raises:
        UserError: there is no such data set, or TFDS cannot open it.
    """
    if not TFDS_NAME.fullmatch(name):
        raise UserError(f"{key}='{name}': not the name of a data set; write NAME, NAME/CONFIG or NAME:1.2.3")
    tfds = _tfds()
    _check_features(data_directory(directory) / base_name(name))
    try:
        if name == "digits":
            from hga_flax.data.digits import prepare_digits

            try:
                prepared = prepare_digits(data_directory(directory))
            except OSError:
                if directory:
                    raise
                prepared = prepare_digits(_scratch())  # the home folder is missing or read-only
            return tfds.builder_from_directory(str(prepared))
        return tfds.builder(name, data_dir=str(data_directory(directory)), file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        packed = packed_datasets(data_directory(directory))
        if name in packed:
            return tfds.builder_from_directory(str(packed[name]))
        names = ["digits", *known, *packed, *tfds.list_builders(with_community_datasets=False)]
        own = f"one of your own is made by: python -m hga_flax prepare folder PATH --name={name}"
        raise UserError(f"{key}: there is no data set '{name}'{nearest(name, names)}; {own}") from None
    except OSError as error:
        raise UserError(f"data.dir: cannot use {data_directory(directory)}: {one_line(error)}") from None
    except Exception as error:
        if OTHER_FORMAT.search(str(error)):
            raise _another_format(name, directory) from None
        if NO_THREAD in str(error) or isinstance(error, MemoryError):
            raise
        # An unknown configuration, a missing package, damaged files, ...
        reason = one_line(error).rpartition('}": ')[2].split(". Here ")[0][:200]  # without TFDS's own arguments
        raise UserError(f"{key}='{name}': TFDS cannot open it: {type(error).__name__}: {reason}") from None


def _another_format(name: str, directory: str) -> UserError:
    return UserError(
        f"{name} in {data_directory(directory)} is not in array_record format; prepare it again: "
        f"python -m hga_flax prepare {shlex.quote(name)} --data-dir=ANOTHER"
    )


def _check_features(folder: pathlib.Path) -> None:
    """Rejects a data set whose files name Python classes outside TFDS, because TFDS would import their modules."""
    # Of the versions and of the configurations' versions. Unlike "**", "*" follows symbolic links.
    for file in [*folder.glob("*/features.json"), *folder.glob("*/*/features.json")]:
        try:
            named = _class_names(json.loads(file.read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)}") from None
        foreign = [name for name in named if not str(name).startswith(TFDS_FEATURES)]
        if foreign:
            raise UserError(f"{file} names the Python class {foreign[0]}, which is not part of TFDS; it is not loaded")


def _class_names(node: Any) -> list[Any]:
    """Returns every "pythonClassName" and "type" of a features.json."""
    if isinstance(node, list):
        return [name for entry in node for name in _class_names(entry)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("pythonClassName", "type") if isinstance(node.get(key), str)]
    return own + [name for entry in node.values() for name in _class_names(entry)]


def packed_datasets(data_dir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the folders of the complete data sets in `data_dir`, by name; if there are several versions, the last."""
    found = sorted(data_dir.glob("[a-z]*/[0-9]*.[0-9]*.[0-9]*/dataset_info.json"))
    return {file.parent.parent.name: file.parent for file in found}


def dataset_info(name: str, directory: str = "") -> DatasetInfo:
    """Returns the `DatasetInfo` of a data set; a TFDS data set need not be prepared.

    Raises:
        UserError: the name is unknown, or the data set does not consist of labelled images.
    """
    if name == FOLDER:
        return DatasetInfo(name, len(names := class_names(folder_root(directory))), 3, names)
    return _info_of(open_builder(name, _here(name, directory)), name)


def _info_of(builder: Any, name: str) -> DatasetInfo:
    """Returns the `DatasetInfo` of a TFDS builder's data set."""
    features, kinds = builder.info.features, _tfds().features
    wrong = f"data.name: '{name}' is not an image classification data set"
    if not {"image", "label"} <= set(features):
        raise UserError(f"{wrong} (no 'image' and 'label')")
    image, label = features["image"], features["label"]
    if type(label) is not kinds.ClassLabel or not label.num_classes:
        raise UserError(f"{wrong}: its 'label' is a {type(label).__name__}, not a ClassLabel with a number of classes")
    # The classes themselves: classes derived from them, such as LabeledImage, hold something else.
    if image.np_dtype not in {kinds.Image: (np.uint8, np.uint16), kinds.Tensor: (np.uint8,)}.get(type(image), ()):
        kind = f"a feature {type(image).__name__} of {getattr(image.np_dtype, '__name__', image.np_dtype)}"
        raise UserError(f"{wrong}: its 'image' is {kind}, not an Image of uint8 or uint16, or a Tensor of uint8")
    names, shape = tuple(label.names or ()), image.shape
    if len(shape) != 3 or shape[-1] not in CHANNELS:
        raise UserError(f"data.name: the images of '{name}' are {shape}; only 1 (grey) or 3 (RGB) channels are read")
    return DatasetInfo(name, int(label.num_classes), int(shape[-1]), names)


def other_data(run: DatasetInfo, there: DatasetInfo, where: str) -> str | None:
    """Returns a sentence on how a data set differs from the one that a run was trained on; None if it does not.

    Compares the number of classes, their names by label, and the channels.
    """
    if other := difference(run.class_names, there.class_names, where):
        return other
    for what in ("num_classes", "channels"):
        if getattr(run, what) != getattr(there, what):
            name = what.removeprefix("num_")
            return f"{where} has {getattr(there, what):,} {name}, the run {getattr(run, what):,}"
    return None


def folder_root(directory: str) -> pathlib.Path:
    """Returns the folder of images that `data.dir` names."""
    if not directory:
        raise UserError("data.dir: name the folder of images, which holds train/CLASS/ and val/CLASS/")
    if is_remote(directory):
        raise UserError(
            f"data.dir={directory}: a folder of images must be on this machine; to use a bucket, pack the images: "
            f"python -m hga_flax prepare folder DIR --data-dir={directory}"
        )
    return expand(directory, "data.dir")


def open_source(
    name: str, split: str, directory: str = "", key: str = "split", like: DatasetInfo | None = None
) -> Source:
    """Opens a split of a prepared data set, with images as encoded bytes.

    Args:
        name: "digits" (prepared on first use), "folder", or the name of a TFDS or packed data set.
        split: split in TFDS notation, for example "train", "train[:90%]".
        directory: TFDS's data directory, "" for its default.
        key: configuration key of the split, for messages.
        like: the data set of a run, whose class names take precedence.

    Raises:
        UserError: the data set or the split is missing or empty, or its classes differ from those of `like`.
    """
    if name == FOLDER:
        return FolderSource(folder_root(directory), split, key, like.class_names if like else None)
    from array_record.python.array_record_data_source import ArrayRecordDataSource  # imported late, like TFDS

    directory = _here(name, directory)
    tfds = _tfds()
    builder = open_builder(name, directory)
    if not builder.info.splits:
        if directory and not data_directory(directory).is_dir():
            raise UserError(f"data.dir={directory}: no such folder")
        command = shlex.join([name, f"--data-dir={data_directory(directory)}"])
        raise UserError(
            f"data.name: {name} is not prepared in {data_directory(directory)}; run python -m hga_flax prepare "
            f"{command}, name another data.dir, or try data.fake=true"
        )
    _check_split(builder.info.splits, name, split, key)
    if like is not None and (other := other_data(like, _info_of(builder, name), str(builder.data_dir))):
        raise UserError(other)
    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        features = builder.info.features
        plain = type(features["image"]) is tfds.features.Image and type(features["label"]) is tfds.features.ClassLabel
        if plain and builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
            records = ArrayRecordDataSource(builder.info.splits[split].file_instructions, READER)
            return Records(records, str(builder.data_dir), _parse)
        return Records(source, str(builder.data_dir))
    except OSError as error:
        raise UserError(f"data.dir: cannot read {builder.data_dir}: {one_line(error)}") from None
    except NotImplementedError:  # TFDS's error for a format without random access
        raise _another_format(name, directory) from None
    except ValueError as error:  # a name that TFDS cannot parse, of a split packed by an old version
        raise UserError(f"{key}='{split}': {one_line(error)}") from None


def _check_split(splits: Any, name: str, split: str, key: str) -> None:
    """Raises UserError unless `split`, which may be a slice or a sum, exists and has examples."""
    for part in split.split("+"):
        whole = part.split("[")[0]
        if whole not in splits and whole != "all":
            there = ", ".join(splits)
            raise UserError(f"{key}='{split}': {name} has no split '{whole}'{nearest(whole, splits)}; it has: {there}")
    try:
        count = splits[split].num_examples
    except (ValueError, AssertionError):
        whole = ", ".join(f"{name} {info.num_examples:,}" for name, info in splits.items())
        raise UserError(
            f"{key}='{split}': not a slice of this data set; write for example '{next(iter(splits))}[:90%]' or "
            f"'[100:200]'; it has: {whole} examples"
        ) from None
    if count < 1:
        raise UserError(f"{key}='{split}': holds no examples")
