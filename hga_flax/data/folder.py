"""A folder of images, `{train,val}/<class>/`, as a source; the class folders may have subfolders."""

import functools
import hashlib
import os
import pathlib
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from hga_flax.data.classes import difference, named
from hga_flax.errors import UserError, nearest, one_line
from hga_flax.images.bad_images import BadImage
from hga_flax.images.image_files import (
    SUFFIXES,
    Endings,
    ending,
    ignored_line,
    images_below,
    is_image,
    is_litter,
    read_image,
)

ALIASES = {"validation": "val", "val": "validation"}
TRAIN = "train"
USUAL_SPLITS = (TRAIN, "val", "validation", "test")


def _split_folder(root: pathlib.Path, split: str, key: str = "") -> pathlib.Path:
    there = splits(root)
    for name in (split, ALIASES.get(split, split)):
        if name in there:  # only listed names, so that no name leads out of the folder
            return root / name
    if "[" in split or "+" in split:
        raise UserError(
            f"{key}='{split}': a folder of images has whole splits only ({_listed(there)}); "
            f"python -m hga_flax prepare folder {shlex.quote(str(root))} makes a data set that can be sliced"
        )
    start = f"{key}='{split}': " if key else ""
    raise UserError(f"{start}the folder {root} has no split '{split}'{nearest(split, there)}; it has: {_listed(there)}")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no folders"


def class_names(root: pathlib.Path) -> tuple[str, ...]:
    """Returns the class names in the order of their labels: the sorted subfolders of `train`.

    Without `train`, the subfolders of all splits count.

    Raises:
        UserError: there are no classes, or one has an unusable name.
    """
    there = splits(root)
    usual = [TRAIN] if TRAIN in there else [split for split in there if split in USUAL_SPLITS] or there
    found = {name: split for split in usual for name in _folders(root / split)}
    if not found:
        raise UserError(_no_classes(root, there))
    for name, split in found.items():
        if not name.isprintable() or name != name.strip():  # a packed data set stores one name per line
            raise UserError(
                f"{root / split}: {name!r} cannot name a class; use printable characters, no spaces at the ends"
            )
    return tuple(sorted(found))


def _no_classes(root: pathlib.Path, there: list[str]) -> str:
    flat = [name for name in there if name not in USUAL_SPLITS and next(images_below(root / name), None)]
    if flat:
        return (
            f"the folder {root} has no split 'train': {named(flat)} hold images, like class folders; move them into "
            f"{root / TRAIN}, and some of their images into {root / 'val'}"
        )
    if TRAIN in there:
        return f"{root / TRAIN} holds no folders; make one for each class"
    return f"the folder {root} has no split 'train'; it has: {_listed(there)}"


def splits(root: pathlib.Path) -> list[str]:
    """Returns the names of the subfolders, which may be splits.

    Raises:
        UserError: the folder does not exist.
    """
    if not os.path.isdir(root):
        where = "" if root.is_absolute() else f", seen from {pathlib.Path.cwd()}"
        raise UserError(f"data.dir={root}: no such folder{where}")
    return _folders(root)


def packable_splits(root: pathlib.Path) -> list[str]:
    """Returns the splits to pack; reports other subfolders on stderr.

    `train` is always a split. `val`, `validation` and `test` are splits if they hold images in subfolders.
    Any other folder is a split if it holds images in a subfolder with the name of a class.

    Raises:
        UserError: there are no splits.
    """
    names, packed = set(class_names(root)), []
    for split in splits(root):
        inside = [name for name in _folders(root / split) if split in USUAL_SPLITS or name in names]
        if split == TRAIN or any(next(images_below(root / split / name), None) for name in inside):
            packed.append(split)
        else:
            print(f"ignored the folder {root / split}: it holds no images in class folders", file=sys.stderr)
    if not packed:
        raise UserError(f"{root} holds no images in class folders, such as {root / TRAIN / 'cat'}")
    return packed


class FolderSource:
    """The images of one split as encoded bytes, sorted by class and then by name.

    Files that are not images are counted by suffix and reported in one line on stderr.

    Args:
        root: folder with a subfolder for each split.
        split: "train", "val" or "validation"; the last two mean the same if only one of them exists.
        key: configuration key of the split, for messages.
        classes: a run's class names by label; None: those of the folder.

    Raises:
        UserError: the split is missing, has no images or has a class that `train` lacks, or its classes differ from
            `classes`.
    """

    def __init__(self, root: pathlib.Path, split: str, key: str = "split", classes: Sequence[str] | None = None):
        folder = _split_folder(root, split, key)
        names = _checked_names(root, folder, classes)
        self._root, self._files, self._labels, ignored = root, [], [], Endings()
        for label, name in enumerate(names):
            files = list(images_below(folder / name, ignored)) if (folder / name).is_dir() else []
            if not files and folder.name == TRAIN:
                print(f"warning: the class '{name}' has no images in {folder}", file=sys.stderr)
            self._files += [os.path.relpath(file, root) for file in files]
            self._labels += [label] * len(files)
        _say_ignored(folder, ignored)
        if not self._files:
            raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}) in class folders")

    def __len__(self) -> int:
        return len(self._files)

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the files' names and labels: equal counts of other files mean another order of training."""
        whole = hashlib.sha256()
        for file, label in zip(self._files, self._labels, strict=True):
            whole.update(b"%d %b\0" % (label, os.fsencode(file.partition(os.sep)[2])))  # whatever the split is called
        return whole.hexdigest()[:16]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a file; returns an empty image if it cannot be read, so that it counts as undecodable."""
        try:
            image = read_image(self._root / self._files[index])
        except (OSError, BadImage):
            image = b""
        # A name that is not UTF-8 could be neither printed nor packed.
        name = os.fsencode(self._files[index]).decode(errors="backslashreplace")
        return {"image": image, "label": self._labels[index], "file_name": name}

    def examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields all examples in the form that `packing.pack` takes."""
        for index in range(len(self)):
            example = self[index]
            yield example["file_name"], example


def _checked_names(root: pathlib.Path, folder: pathlib.Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the class names by label, checked against the subfolders of a split."""
    own, here = TRAIN in splits(root), _folders(folder)
    if classes is None or (own and tuple(classes) == class_names(root)):
        names = class_names(root)
        known = set(names)
        if unknown := next((name for name in here if name not in known), None):
            others = [split for split in splits(root) if split != folder.name]
            where = root / (TRAIN if own else others[0] if others else folder.name)
            alike = next((name for name in names if _normal(name) == _normal(unknown)), None)
            hint = "; its name is spelled with other Unicode characters there: rename one of the two" if alike else ""
            raise UserError(f"{folder} has the class '{unknown}', which {where} does not have{hint}")
        return names
    # A run's names take precedence: they must include those of this split, and each needs a folder here or in train.
    known = [name for name in classes if (folder / name).is_dir() or (root / TRAIN / name).is_dir()]
    there = sorted({*here, *known})
    if other := difference(sorted(classes), there, str(folder)):
        hint = "; make an empty folder for a class without images" if set(there) < set(classes) else ""
        raise UserError(f"{other}{hint}")
    of_run = set(classes)
    more = [name for name in _folders(root / TRAIN) if name not in of_run] if own else []
    if more:
        print(f"warning: {root / TRAIN} has classes that the run does not know: {named(more)}", file=sys.stderr)
    return tuple(classes)


def _normal(name: str) -> str:
    """Returns a name in Unicode's form NFC: Macs write accents as characters of their own (NFD)."""
    return unicodedata.normalize("NFC", name)


def _say_ignored(folder: pathlib.Path, ignored: Endings) -> None:
    """Reports on stderr which files of a split are not read: other files, and images outside the class folders."""
    loose = 0
    for path in _entries(folder):
        if path.is_dir() or is_litter(path.name, folder=False):
            continue
        if is_image(path.name):
            loose += 1
        else:
            ignored[ending(path.name)] += 1
    if line := ignored_line(ignored, str(folder)):
        print(line, file=sys.stderr)
    if loose:
        print(
            f"ignored {loose:,} image{'s' * (loose != 1)} directly in {folder}, outside the class folders",
            file=sys.stderr,
        )


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the entries of a folder that are not hidden, sorted."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"data.dir: cannot read {folder}: {error.strerror or one_line(error)}") from None


def _folders(folder: pathlib.Path) -> list[str]:
    return [p.name for p in _entries(folder) if not is_litter(p.name, folder=True) and p.is_dir()]
