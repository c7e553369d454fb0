"""A folder of images, `{train,val}/<class>/*.{jpg,jpeg,png,webp}`, as a source."""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from hga_flax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ALIASES = {"validation": "val", "val": "validation"}


def _split_folder(root: pathlib.Path, split: str) -> pathlib.Path:
    for name in (split, ALIASES.get(split, split)):
        if (root / name).is_dir():
            return root / name
    if not root.is_dir():
        raise UserError(f"data.dir={root}: no such folder")
    there = ", ".join(_folders(root)) or "no folders"
    raise UserError(f"the folder {root} has no split '{split}'; it has: {there}")


def class_names(root: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the classes, in the order of their labels: the folders of `train`, sorted.

    Raises:
        UserError: there are none.
    """
    folder = _split_folder(root, "train")
    names = tuple(_folders(folder))
    if not names:
        raise UserError(f"{folder} holds no folders; make one for each class")
    return names


def splits(root: pathlib.Path) -> list[str]:
    """Returns the splits that a folder has, as they are called in it."""
    return _folders(root)


class FolderSource:
    """The images of one split, by class and then by name, as bytes.

    Args:
        root: holds a folder for each split.
        split: "train", or "val" and "validation", which mean the same where only one is there.

    Raises:
        UserError: no such split, no images in it, or a class that `train` does not have.
    """

    def __init__(self, root: pathlib.Path, split: str):
        folder, names = _split_folder(root, split), class_names(root)
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


def _folders(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
