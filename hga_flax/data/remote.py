"""Copies prepared data sets from a bucket to this machine, once, because array_record reads local files by position.

A set is complete if it has a dataset_info.json, which is uploaded last. A local copy gets its name when it is complete.
"""

import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hga_flax.errors import UserError, one_line
from hga_flax.storage.buckets import Fact, Remote, cache_folder, check_space, folder_name, is_remote, make_folder
from hga_flax.storage.locks import lock

MARKER = "dataset_info.json"
RECORD = ".copied.json"  # lists the files in the bucket from which a local copy was made
SECONDS_BETWEEN_LINES = 10.0


class PreparedSet(NamedTuple):
    """A complete set: its folder, VERSION or CONFIG/VERSION, and its files by their names in that folder."""

    folder: str
    files: dict[str, Fact]


def local_directory(directory: str, name: str) -> str:
    """Returns a data directory on this machine that holds the set `name`, copied from a bucket if needed.

    Args:
        directory: data.dir; "" and local folders are returned unchanged.
        name: NAME, NAME/CONFIG or NAME:VERSION; without a version, the newest is copied.

    Raises:
        UserError: the bucket cannot be read, or the copy does not fit here.
    """
    address = directory or os.environ.get("TFDS_DATA_DIR", "")
    if not is_remote(address):
        return directory
    root, base, remote = copies_of(address), _base(name), Remote(address, "data.dir")
    complete = _complete_sets(remote.below(base))
    _drop_gone(root / base, complete)
    found = _choose(complete, name, remote.address)
    if found is not None:
        _copy(Remote(f"{address}/{base}/{found.folder}", "data.dir"), found, root / base / found.folder)
    return str(root)


def copies_of(address: str) -> pathlib.Path:
    """Returns the data directory on this machine for copies of an address; messages show the address instead."""
    address = Remote(address, "data.dir").address
    return make_folder(cache_folder() / "data" / folder_name(address), address)


def find_set(remote: Remote, name: str) -> PreparedSet | None:
    """Returns the set that a name refers to, or None if it is not prepared there.

    Raises:
        UserError: the bucket cannot be read, or the set has several configurations and the name gives none.
    """
    return _choose(_complete_sets(remote.below(_base(name))), name, remote.address)


def _base(name: str) -> str:
    """Returns NAME of NAME/CONFIG and NAME:VERSION."""
    return name.partition(":")[0].partition("/")[0]


def _complete_sets(remote: Remote) -> dict[str, dict[str, Fact]]:
    """Returns the files of every complete version, by their names in the version's folder."""
    files = remote.files()
    folders = [file.rpartition("/")[0] for file in files if file.rpartition("/")[2] == MARKER]
    return {f: {n.removeprefix(f"{f}/"): fact for n, fact in files.items() if n.startswith(f"{f}/")} for f in folders}


def _drop_gone(folder: pathlib.Path, complete: Iterable[str]) -> None:
    """Removes local copies of versions that the bucket no longer has, because TFDS uses the newest one it finds."""
    for record in [*folder.glob(f"*/{RECORD}"), *folder.glob(f"*/*/{RECORD}")]:
        if record.parent.relative_to(folder).as_posix() not in complete and not record.parent.name.startswith("."):
            with _locked(record.parent.parent):
                shutil.rmtree(record.parent, ignore_errors=True)


def _choose(complete: dict[str, dict[str, Fact]], name: str, address: str) -> PreparedSet | None:
    base, _, version = name.partition(":")
    base, _, config = base.partition("/")
    fit = [f for f in complete if _parts(f)[1] == (version or _parts(f)[1]) and (not config or _parts(f)[0] == config)]
    configs = sorted({_parts(folder)[0] for folder in fit})
    if len(configs) > 1:
        there = ", ".join(configs).strip(", ")
        raise UserError(f"data.name={name}: {address} has several configurations ({there}); write {base}/{configs[-1]}")
    if not fit:
        return None
    folder = max(fit, key=lambda f: [int(n) if n.isdecimal() else -1 for n in _parts(f)[1].split(".")])
    return PreparedSet(folder, complete[folder])


def _parts(folder: str) -> tuple[str, str]:
    config, _, version = folder.rpartition("/")
    return config, version


def _copy(remote: Remote, found: PreparedSet, target: pathlib.Path) -> None:
    """Makes `target` an up-to-date copy of a set; if two processes begin at once, one waits."""
    with _locked(target.parent):
        if _copied(target) == found.files:
            return
        scratch = target.with_name(f".copying-{target.name}")
        done = _copied(scratch)  # by an attempt that was interrupted
        if not done or not done.items() <= found.files.items():
            done = {}
            shutil.rmtree(scratch, ignore_errors=True)
        missing = {name: fact for name, fact in found.files.items() if name not in done}
        size = sum(fact.size for fact in missing.values())
        try:
            scratch.mkdir(exist_ok=True)
            check_space(scratch, size, remote.address)
            print(f"copying {remote.address}, {size / 1e9:,.2f} GB, to {target}", file=sys.stderr, flush=True)
            tell = _progress(remote.address, missing, size)
            try:
                remote.get(missing, scratch, lambda name: (done.update({name: missing[name]}), tell(name)))
            finally:
                _record(scratch, dict(done))
            for part in scratch.rglob(".*.part"):
                part.unlink()
            if target.exists():  # an outdated or damaged copy
                shutil.rmtree(target)
            scratch.rename(target)
        except FileNotFoundError:
            raise UserError(f"{remote.address} changed while it was being copied; try again") from None
        except OSError as error:
            raise UserError(f"{remote.address} cannot be copied to {target}: {error.strerror or error}") from None


def _progress(address: str, files: dict[str, Fact], size: int) -> Callable[[str], None]:
    done, said = 0, time.monotonic()

    def tell(name: str) -> None:
        nonlocal done, said
        done += files[name].size
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"copying {address}: {done / 1e9:,.2f} of {size / 1e9:,.2f} GB", file=sys.stderr, flush=True)

    return tell


def upload(folder: pathlib.Path, remote: Remote) -> None:
    """Copies a prepared set to a bucket, its marker last, and records that the local files are the bucket's copy.

    Args:
        folder: folder of the set.
        remote: the set's folder in the bucket.

    Raises:
        UserError: the bucket cannot be written to.
    """
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != RECORD]
    remote.put(folder, [name for name in names if name != MARKER])
    remote.put(folder, [MARKER])
    _record(folder, remote.files())


def _record(folder: pathlib.Path, files: dict[str, Fact]) -> None:
    (folder / RECORD).write_text(json.dumps(files))


def _copied(folder: pathlib.Path) -> dict[str, Fact]:
    """Returns the recorded facts of the files that were copied to a folder and still have their sizes."""
    try:
        facts = {name: Fact(*fact) for name, fact in json.loads((folder / RECORD).read_text()).items()}
        return {name: fact for name, fact in facts.items() if _size(folder / name) == fact.size}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _size(file: pathlib.Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


@contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    try:
        held = lock(folder / ".lock", wait=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or one_line(error)}") from None
    with held:
        yield
