"""Reads labelled arrays from .npz files and from MNIST's IDX files, ready to be packed."""

import dataclasses
import gzip
import pathlib
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from hga_flax.data.classes import named
from hga_flax.errors import UserError, one_line

IDX_SPLITS = {"train": "train", "t10k": "test"}  # prefix of MNIST's files: split
IDX_IMAGES = re.compile(r"(?P<prefix>.+)-images(?P<point>[-.])idx3-ubyte(?P<gz>\.gz)?")
# Names of a split's arrays in .npz files: Keras's and MedMNIST's; `_pairs` adds those of a file with one split.
NPZ_NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"))
NPZ_SPLITS = ("train", "val", "validation", "test")
MOST_CLASSES = 1_000_000  # larger labels are not class numbers; each class takes a name and a logit


@dataclasses.dataclass(frozen=True)
class LabelledArrays:
    """Splits of `images` uint8 `[N, H, W, C]` and `labels` int64 `[N]`, and the names of the classes by label."""

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of one image."""
        return next(iter(self.splits.values()))[0].shape[1:]

    def examples(self, split: str) -> Iterator[tuple[int, dict]]:
        """Yields the examples of a split in the form that `packing.pack` takes, keyed by number, as in TFDS's MNIST."""
        for key, (image, label) in enumerate(zip(*self.splits[split], strict=True)):
            yield key, {"image": image, "label": int(label)}


def _labelled(splits: dict[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, ...], where: str) -> LabelledArrays:
    """Checks the arrays and brings them to their final shapes."""
    checked = {split: _checked(images, labels, where, split) for split, (images, labels) in splits.items()}
    if len({images.shape[1:] for images, _ in checked.values()}) != 1:
        raise UserError(f"{where}: the splits hold images of different shapes")
    there = sorted({int(label) for _, labels in checked.values() for label in np.unique(labels)})
    classes = there[-1] + 1
    if classes > MOST_CLASSES:
        raise UserError(
            f"{where}: the labels go up to {there[-1]:,}, which would make as many classes; number the {len(there):,} "
            f"classes in use from 0 to {len(there) - 1:,}"
        )
    if there[0] > 0 and len(names) < classes:
        raise UserError(
            f"{where}: the labels are {there[0]} to {there[-1]}, and none is 0: subtract {there[0]} from them, or name "
            f"all {classes} classes, from 0 on, with --class-names"
        )
    if names and len(names) < classes:
        raise UserError(
            f"{where}: {len(names)} class name{'s' * (len(names) != 1)}, but the labels go up to {classes - 1}"
        )
    names = names or tuple(str(c) for c in range(classes))
    if len(set(names)) != len(names):
        raise UserError(f"{where}: two classes have the same name")
    strange = [name for name in names if not name or not name.isprintable() or name != name.strip()]
    if strange:
        raise UserError(f"{where}: {strange[0]!r} cannot name a class; use printable characters, no spaces at the ends")
    for split, (_, labels) in checked.items():
        present = set(np.unique(labels).tolist())
        if split == "train" and (empty := [name for label, name in enumerate(names) if label not in present]):
            print(f"warning: {where}: '{split}' has no images of {named(empty)}", file=sys.stderr)
    return LabelledArrays(checked, names)


def _checked(images: np.ndarray, labels: np.ndarray, where: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images `[N, H, W, C]` and the labels int64 `[N]` of a split."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim and not len(images):
        raise UserError(f"{where}: the split '{split}' holds no images; leave it out")
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8 or images.size == 0:
        raise UserError(
            f"{where}: the images of '{split}' are {images.dtype} {list(images.shape)}; "
            "they must be uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] with values 0 to 255"
        )
    whole = labels.dtype.kind in "iu" and labels.size == len(images) == (len(labels) if labels.ndim else 0)
    # Compared before the conversion, which would wrap the largest unsigned numbers to negative ones.
    if not whole or labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        range_ = f", {labels.min()} to {labels.max()}" if whole else ""
        raise UserError(
            f"{where}: the labels of '{split}' are {labels.dtype} {list(labels.shape)}{range_}; "
            f"they must be {len(images)} whole numbers from 0"
        )
    return images, labels.reshape(-1).astype(np.int64)


def read_npz(file: pathlib.Path, class_names: tuple[str, ...] = ()) -> LabelledArrays:
    """Reads `x_SPLIT`/`y_SPLIT`, `SPLIT_images`/`SPLIT_labels` or `images`/`labels`, and `class_names` if present.

    Raises:
        UserError: the file cannot be read or does not hold such arrays.
    """
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise UserError(
                f"{file} holds one array, {loaded.dtype} {list(loaded.shape)}, and no labels; save both in one file: "
                "numpy.savez('FILE.npz', images=..., labels=...)"
            )
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{others[0]} is not an array")
    except ValueError as error:
        reason = one_line(error)
        if "Object arrays" in reason:  # NumPy suggests allowing pickles, which can run code from the file
            reason = "it holds Python objects; save arrays of numbers, and names as an array of strings (dtype str)"
        elif "pickle" in reason:
            reason = "it is not a NumPy archive"
        raise UserError(f"{file} cannot be read as .npz: {reason}") from None
    except (
        *(OSError, EOFError, AttributeError, KeyError, zlib.error, zipfile.BadZipFile),
        *(RuntimeError, MemoryError),  # an encrypted archive or an unknown compression, a header of terabytes
    ) as error:
        raise UserError(f"{file} cannot be read as .npz: {one_line(error)}") from None
    splits = _pairs(arrays, file)
    if not splits:
        raise UserError(
            f"{file}: found no x_train and y_train, no train_images and train_labels, no images and labels; "
            f"it holds: {', '.join(arrays) or 'nothing'}"
        )
    names = class_names or _texts(arrays.get("class_names", np.array(())), str(file))
    return _labelled(splits, names, str(file))


def _pairs(arrays: dict[str, np.ndarray], file: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the images and labels of each split; lists any other arrays on stderr."""
    known = {split: [(x.format(split), y.format(split)) for x, y in NPZ_NAMES] for split in NPZ_SPLITS}
    known["train"].append(("images", "labels"))
    splits, used = {}, {"class_names"}
    for split, pairs in known.items():
        for pair in pairs:
            there = [name for name in pair if name in arrays]
            if len(there) == 1:
                (missing,) = set(pair) - set(there)
                raise UserError(f"{file} holds {there[0]} but no {missing}; add it, or leave {there[0]} out")
            if there and split in splits:
                raise UserError(f"{file} holds the split '{split}' twice; {pair[0]} is the second; leave one out")
            if there:
                splits[split] = arrays[pair[0]], arrays[pair[1]]
            used |= set(there)
    if splits and (others := [name for name in arrays if name not in used]):
        print(f"ignored in {file}: {named(others)}", file=sys.stderr)
    return splits


def _texts(names: np.ndarray, where: str) -> tuple[str, ...]:
    """Returns the entries of an array as strings; NumPy may store names as bytes."""
    try:
        return tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names.ravel().tolist())
    except UnicodeDecodeError:
        raise UserError(f"{where}: class_names holds bytes that are not UTF-8") from None


def read_idx_file(file: pathlib.Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped or not, into a uint8 array.

    Raises:
        UserError: the file cannot be read, or does not match its header.
    """
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        zero, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        start = 4 + 4 * dimensions
        if zero != 0 or kind != 8 or len(data) != start + int(np.prod(shape)):
            raise ValueError("not an IDX file of unsigned bytes, or incomplete")
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None


def read_idx(folder: pathlib.Path, class_names: tuple[str, ...] = ()) -> LabelledArrays:
    """Reads the pairs of `PREFIX-images-idx3-ubyte[.gz]` and `PREFIX-labels-idx1-ubyte[.gz]` in a folder.

    Names with a point, `PREFIX-images.idx3-ubyte`, are read too.

    The prefixes "train" and "t10k" become the splits "train" and "test", as in TFDS.

    Raises:
        UserError: there are no such files, or they cannot be read.
    """
    splits: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for images in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = IDX_IMAGES.fullmatch(images.name)
        if not name or (name["gz"] and images.with_suffix("").exists()):  # the uncompressed file of two is read
            continue
        labels = f"{name['prefix']}-labels{name['point']}idx1-ubyte"
        found = next((folder / file for file in (labels, f"{labels}.gz") if (folder / file).exists()), None)
        if found is None:
            raise UserError(f"{images} has no labels next to it: {labels}, also with .gz")
        split = IDX_SPLITS.get(name["prefix"], name["prefix"])
        if split in splits:
            raise UserError(f"{folder} holds the images of '{split}' twice; {images.name} is the second; leave one out")
        splits[split] = (read_idx_file(images), read_idx_file(found))
    if not splits:
        raise UserError(f"{folder} holds no IDX files, such as train-images-idx3-ubyte, also with .gz")
    return _labelled(splits, class_names, str(folder))
