"""A checkpoint's manifest: size and checksum of each of its files, written before the folder gets its final name.

It detects later damage before anything is read: a file that is truncated, empty, missing or changed in one bit,
a folder that was copied partially or renamed to another step. Orbax alone detects most of this, but neither a
changed byte of its JSON nor a renamed folder.
"""

import contextlib
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from hga_flax.errors import TemporaryError, UserError, is_passing, one_line
from hga_flax.processes.coordination import raise_if_lost
from hga_flax.storage.locks import Claims

NAME = "seal.json"
CLAIM = ".trained_by"  # in a run's folder, names the process that trains there; see locks.py
CHUNK = 1 << 22  # bytes per read
PAUSE_SECONDS = 2.0  # before a file is tried again
GOING_SECONDS = 1.0  # after which a checkpoint that cannot be read and is still there is damaged
TRIES = 8  # of listing checkpoints that training removes meanwhile
T = TypeVar("T")


class UnreadableCheckpoint(UserError):
    """A checkpoint whose files are damaged."""


class RemovedCheckpoint(UnreadableCheckpoint):
    """A checkpoint that a run in training has removed since it was listed: others have taken its place."""


def unreadable(path: pathlib.Path, why: str, *, may_be_removed: bool) -> UnreadableCheckpoint:
    """Returns the error for a checkpoint that cannot be read: a `RemovedCheckpoint` if that may be and it is gone."""
    if may_be_removed and is_going(path):
        what = "training there has removed it; try again, or train with a larger checkpoint.keep"
        return RemovedCheckpoint(f"checkpoint {path} cannot be read: {what}")
    return UnreadableCheckpoint(f"checkpoint {path} cannot be read: {why}")


@contextlib.contextmanager
def reading(path: pathlib.Path, *, may_be_removed: bool) -> Iterator[None]:
    """Turns what Orbax raises for a damaged checkpoint into an `unreadable` one's error."""
    try:
        yield
    except UserError as error:
        if isinstance(error, UnreadableCheckpoint | TemporaryError) or not may_be_removed or _is_there(path / NAME):
            raise
        raise unreadable(path, one_line(error), may_be_removed=may_be_removed) from error  # the arrays may be deleted
    except Exception as error:  # on damaged files Orbax and TensorStore may raise anything
        raise_if_lost(error)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        why = one_line(error)[:300] if _is_there(path) else "it is gone"
        raise unreadable(path, why, may_be_removed=may_be_removed) from error


def is_going(path: pathlib.Path) -> bool:
    """Returns whether a checkpoint is gone or, where somebody trains, soon is: a folder takes a moment to delete."""
    if not _is_there(path):
        return True
    if not Claims(path.parent.parent).is_held(CLAIM):
        return False
    end = time.monotonic() + GOING_SECONDS
    while _is_there(path) and time.monotonic() < end:
        time.sleep(0.05)
    return not _is_there(path)


def _is_there(path: pathlib.Path) -> bool:
    """Returns False only if nothing has this name; a link to a disk that is away is there."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # the file server is away
        return True
    return True


def read_again(read: Callable[[], T]) -> T:
    """Returns `read()`, which lists checkpoints and reads one; repeats it if that one was removed in between.

    Raises:
        RemovedCheckpoint: training removes them faster than they can be read.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(RemovedCheckpoint):
            return read()
    return read()


def write_manifest(folder: pathlib.Path, step: int) -> None:
    """Writes the manifest of the checkpoint in `folder`, whose items must be complete."""
    (folder / NAME).write_text(json.dumps({"step": step, "files": _files(folder)}))


def find_damage(folder: pathlib.Path, step: int, item: str | None = None, *, tries: int = 3) -> str | None:
    """Compares a checkpoint with its manifest.

    Args:
        folder: folder of the checkpoint.
        step: expected step, from the folder's name.
        item: check only the files of this item.
        tries: how often to try where a file cannot be read for a reason that may pass.

    Returns:
        A description of the damage, or None.

    Raises:
        UserError: the file server does not answer, which says nothing about the content.
    """
    try:
        try:
            folder.stat()  # unlike `exists`, says when a file server does not answer
        except FileNotFoundError:
            return "it is gone"
        saved = json.loads((folder / NAME).read_text())
        own_step = saved["step"]
        wanted = {name: (size, checksum) for name, (size, checksum) in saved["files"].items()}
        if item is not None:
            wanted = {name: facts for name, facts in wanted.items() if name.startswith(f"{item}/")}
        if own_step != step:
            return f"it is the checkpoint of step {own_step} under another name"
        found = {name: facts for name in wanted if (facts := _facts_if_there(folder / name))}
    except FileNotFoundError:
        return f"it has no {NAME}: it is incomplete, or an older version wrote it (docs/scaling.md)"
    except NotADirectoryError:
        return "it is not a folder"
    except OSError as error:
        passing = is_passing(error)
        if passing and tries > 1:
            time.sleep(PAUSE_SECONDS)
            return find_damage(folder, step, item, tries=tries - 1)
        if passing:
            raise TemporaryError(
                f"checkpoint {folder} cannot be read now: {error.strerror or error}; the same command tries again"
            ) from None
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {NAME} is damaged"
    for name, (size, checksum) in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes instead of {size}"
        if found[name][1] != checksum:
            return f"the content of {name} has changed"
    return None


def _files(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Returns size and checksum of the items' files; Orbax's other files may change later, and none is needed."""
    files = [file for item in sorted(folder.iterdir()) if item.is_dir() for file in sorted(item.rglob("*"))]
    return {file.relative_to(folder).as_posix(): _facts(file) for file in files if file.is_file()}


def _facts_if_there(file: pathlib.Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return _facts(file)
    return None


def _facts(file: pathlib.Path) -> tuple[int, int]:
    """Returns (bytes, CRC-32)."""
    size = checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum
