"""Decides which files in a folder are images, the same way for training, preparation and prediction."""

import collections
import os
import pathlib
import stat
from collections.abc import Iterator

from hga_flax.errors import UserError, one_line
from hga_flax.images.bad_images import BadImage

# Suffixes of images that OpenCV decodes to 8 bits; the content decides how. Other files are ignored and counted.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
    ".jp2", ".pbm", ".pgm", ".ppm", ".pnm", ".pam", ".ras",
)  # fmt: skip
# Names that operating systems, archives and network drives leave behind, in lower case. Hidden names (.DS_Store,
# .ipynb_checkpoints, ._photo.jpg) are skipped as well.
LITTER_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__",
}  # fmt: skip
LITTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
MOST_NAMED = 6  # suffixes listed in a line

Endings = collections.Counter  # number of ignored files by suffix


def is_litter(name: str, folder: bool) -> bool:
    """Returns whether a name is hidden or was left behind by a system, so that no user chose it."""
    return name.startswith(".") or name.lower() in (LITTER_FOLDERS if folder else LITTER_FILES)


def is_image(name: str) -> bool:
    """Returns whether a name has one of the suffixes in `SUFFIXES`, in any case."""
    return name.lower().endswith(SUFFIXES)


def images_below(folder: str | os.PathLike[str], ignored: Endings | None = None) -> Iterator[str]:
    """Yields the images in a folder and its subfolders, sorted within each; follows links, but visits no folder twice.

    Args:
        folder: the folder to search; hidden files and litter are skipped.
        ignored: counts the other files by suffix.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror or one_line(error)}")

    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder already visited
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


def read_image(file: str | os.PathLike[str]) -> bytes:
    """Returns the contents of a file, without waiting for a writer if it is a named pipe.

    Raises:
        BadImage: it is not a regular file.
        OSError: it cannot be read.
    """
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise BadImage("it is not a regular file")
        return opened.read()


def ending(name: str) -> str:
    """Returns the suffix of a file name in lower case, "" for none."""
    return pathlib.PurePath(name).suffix.lower()


def ignored_line(ignored: Endings, where: str) -> str:
    """Returns one line about the ignored files, or "" if there are none.

    Args:
        ignored: number of ignored files by suffix.
        where: name of the place that was searched.
    """
    if not ignored:
        return ""
    most_first = sorted(ignored.items(), key=lambda item: (-item[1], item[0] or "~"))
    kinds = [f"{count:,} {kind or 'without a suffix'}" for kind, count in most_first]
    more = f" and {len(kinds) - MOST_NAMED} other kinds" if len(kinds) > MOST_NAMED else ""
    total = ignored.total()
    what = "file that is not an image" if total == 1 else "files that are not images"
    return f"ignored {total:,} {what} in {where}: {', '.join(kinds[:MOST_NAMED])}{more}"
