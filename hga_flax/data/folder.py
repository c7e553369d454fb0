"""A folder of images, `{train,val}/<class>/*.{jpg,jpeg,png,webp}`, as a source."""

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from hga_flax.errors import UserError, nearest, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ALIASES = {"validation": "val", "val": "validation"}


def _split_folder(root: pathlib.Path, split: str, key: str = "") -> pathlib.Path:
    if not os.path.isdir(root):
        raise UserError(f"data.dir={root}: no such folder")
    there = _folders(root)
    for name in (split, ALIASES.get(split, split)):
        if name in there:  # so that no name leads out of the folder
            return root / name
    if "[" in split or "+" in split:
        raise UserError(
            f"{key}='{split}': a folder of images has whole splits only ({_listed(there)}); "
            f"python -m hga_flax prepare folder {root} makes a data set that can be cut"
        )
    named = f"{key}='{split}': " if key else ""
    raise UserError(f"{named}the folder {root} has no split '{split}'{nearest(split, there)}; it has: {_listed(there)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no folders"


def class_names(root: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the classes, in the order of their labels: the folders of `train`, sorted.

    Raises:
        UserError: there are none.
    """
    folder = _split_folder(root, "train")
    names = tuple(_folders(folder))
    if not names:
        raise UserError(f"{folder} holds no folders; make one for each class")
    strange = [name for name in names if not name.isprintable() or name != name.strip()]
    if strange:  # a packed data set keeps one name a line
        raise UserError(f"{folder}: {strange[0]!r} cannot name a class; use printable characters, no blank at the ends")
    return names


def splits(root: pathlib.Path) -> list[str]:
    """Returns the splits that a folder has, as they are called in it."""
    return _folders(root)


class FolderSource:
    """The images of one split, by class and then by name, as bytes.

    Args:
        root: holds a folder for each split.
        split: "train", or "val" and "validation", which mean the same where only one is there.
        key: what messages call the split.

    Raises:
        UserError: no such split, no images in it, or a class that `train` does not have.
    """

    def __init__(self, root: pathlib.Path, split: str, key: str = "split"):
        folder, names = _split_folder(root, split, key), class_names(root)
        unknown = [n for n in _folders(folder) if n not in names]
        if unknown:
            raise UserError(f"{folder} has the class '{unknown[0]}', which {root / 'train'} has not")
        self._root, self._files, self._labels = root, [], []
        for label, name in enumerate(names):
            files = _images(folder / name)
            if not files and folder.name == "train":
                print(f"warning: the class '{name}' has no images in {folder}", file=sys.stderr)
            self._files += [str(file.relative_to(root)) for file in files]
            self._labels += [label] * len(files)
        if not self._files:
            raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}) in its folders")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a file; one that cannot be read counts as an image that cannot be decoded."""
        try:
            image = (self._root / self._files[index]).read_bytes()
        except OSError:
            image = b""
        return {"image": image, "label": self._labels[index], "file_name": self._files[index]}

    def examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields all examples as `packing.pack` takes them."""
        for index, name in enumerate(self._files):
            yield name, self[index]


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns what lies in a folder and is not hidden, sorted."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"data.dir: cannot read {folder}: {error.strerror or one_line(error)}") from None


def _folders(folder: pathlib.Path) -> list[str]:
    return [p.name for p in _entries(folder) if p.is_dir()]


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in _entries(folder) if p.suffix.lower() in SUFFIXES] if folder.is_dir() else []
