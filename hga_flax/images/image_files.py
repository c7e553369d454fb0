"""Which files below a folder are images: one answer for training, preparing and prediction."""

import collections
import os
import pathlib
from collections.abc import Iterator

from hga_flax.errors import UserError, one_line

# Of files that OpenCV decodes to 8 bits; the content decides how each is read. Others are counted as ignored.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
    ".jp2", ".pbm", ".pgm", ".ppm", ".pnm", ".pam", ".ras",
)  # fmt: skip
# What operating systems, archives and network drives leave behind, in small letters. Hidden names (.DS_Store,
# .ipynb_checkpoints, ._photo.jpg) are left out as well.
LITTER_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__",
}  # fmt: skip
LITTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
MOST_NAMED = 6  # endings in a line

Endings = collections.Counter  # of ignored files: how many have which ending


def is_litter(name: str, folder: bool) -> bool:
    """True for a name that no user gave: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in (LITTER_FOLDERS if folder else LITTER_FILES)


def is_image(name: str) -> bool:
    """True for a name with one of the endings in `SUFFIXES`, in any case."""
    return name.lower().endswith(SUFFIXES)


def images_below(folder: str | os.PathLike[str], ignored: Endings | None = None) -> Iterator[str]:
    """Yields the images in a folder and in all folders below it, sorted within each; links are followed, once.

    Args:
        folder: where to look; hidden files and litter are passed over.
        ignored: counts the other files by their endings.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror or one_line(error)}")

    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_litter(name, folder=True))
        for name in sorted(files):
            if is_litter(name, folder=False):
                continue
            if is_image(name):
                yield os.path.join(root, name)
            elif ignored is not None:
                ignored[ending(name)] += 1


def ending(name: str) -> str:
    """Returns the ending of a file's name in small letters, "" for none."""
    return pathlib.PurePath(name).suffix.lower()


def ignored_line(ignored: Endings, where: str) -> str:
    """Returns one line about the files that are not read, "" where there are none.

    Args:
        ignored: how many have which ending.
        where: the folder, or what else was searched.
    """
    if not ignored:
        return ""
    most_first = sorted(ignored.items(), key=lambda item: (-item[1], item[0] or "~"))
    kinds = [f"{count:,} {kind or 'without an ending'}" for kind, count in most_first]
    more = f" and {len(kinds) - MOST_NAMED} other kinds" if len(kinds) > MOST_NAMED else ""
    total = ignored.total()
    what = "file that is no image" if total == 1 else "files that are no images"
    return f"ignored {total:,} {what} in {where}: {', '.join(kinds[:MOST_NAMED])}{more}"
