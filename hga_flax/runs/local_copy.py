"""The local copy of a run in a bucket: a folder on this machine that works like any other workdir.

The bucket is authoritative: opening a local copy syncs it from the bucket and downloads only what is missing here. A
checkpoint in the bucket counts as complete if it has a manifest, which is uploaded last and deleted first.

The local copy that a session trained in may be newer than the bucket if the session was killed or lost the network.
Newer files are kept and uploaded if no other session has trained in the bucket since: each session first writes its
ID there (session.json). Files that were uploaded once but are gone from the bucket were removed by somebody, and are
not restored. A damaged local file never counts as newer than the bucket's: a checkpoint that does not match its
manifest, or a log shorter than the bucket's.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

from hga_flax.errors import TemporaryError, UserError, expand, leave, one_line
from hga_flax.runs import manifest
from hga_flax.storage.buckets import (
    Fact,
    Remote,
    cache_folder,
    check_space,
    folder_name,
    is_remote,
    make_folder,
)
from hga_flax.storage.locks import Claim, claimed, surely_lost

SESSION, CONFIG = "session.json", "config.json"
RECORD = ".mirror.json"  # in a local copy: records which of its files are equal to the bucket's
CHECKPOINT = re.compile(r"((?:checkpoints|superseded)/\d+)/(.+)")  # folder, file name in it
LOGS = ("metrics.jsonl", "tensorboard/")  # append-only; lines that a sync brings back, the trainer drops again
TRIES = 3  # attempts to read a run that is being trained meanwhile

Here = tuple[int, int]  # size in bytes and modification time of a file


class Pair(NamedTuple):
    """State of a local file and its object in the bucket when the two were equal."""

    here: Here
    there: Fact


def manifest_of(name: str) -> str | None:
    """Returns the name of the manifest of the checkpoint that a file belongs to, or None if it belongs to none."""
    match = CHECKPOINT.fullmatch(name)
    return f"{match[1]}/{manifest.NAME}" if match else None


class Overtaken(UserError):
    """Another session has begun to train in the bucket."""


class LocalCopy:
    """The local copy of one address; exclusive to this process until it is closed.

    Args:
        address: address of the run in a bucket.
        key: name of the address in messages.
        trains: whether the run will be trained, or only read.

    Raises:
        UserError: another command on this machine trains this run.

    Attributes:
        folder: folder of the local copy.
        remote: the folder in the bucket.
        pairs: files that are equal here and in the bucket, by name.
        there: the bucket's files at the last listing.
    """

    def __init__(self, address: str, key: str, *, trains: bool = False):
        self.remote, self._trains, self._held = Remote(address, key), trains, contextlib.ExitStack()
        self.folder, self._claim = _take(self.remote, trains, self._held)
        self.there: dict[str, Fact] = {}
        self._sessions, self.pairs = self._recorded()

    def close(self) -> None:
        """Releases the local copy for the next process."""
        self._held.close()

    @property
    def is_lost(self) -> bool:
        """True if the folder was removed, or another process took it over because this one was suspended."""
        return surely_lost(self._claim) or not self.folder.is_dir()

    def pull(self, *, light: bool = False) -> None:
        """Syncs the local copy from the bucket.

        Args:
            light: of the checkpoints download only the manifests, enough to list the steps.

        Raises:
            UserError: the bucket cannot be read, or this machine's disk is too full.
        """
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError):  # the run is still training and removed an old checkpoint
                return self._pull(light=light)
        raise UserError(f"{self.remote.key}={self.remote.address}: it changes while it is read; try again")

    def _pull(self, light: bool) -> None:
        there = self.there = self.remote.files()
        own = self._trains and self._session_there() in self._sessions
        here = self.here()
        if not self._trains and CONFIG not in there and not any(map(CHECKPOINT.fullmatch, there)):
            there = {}  # not a run, perhaps a folder of many: copy nothing
        wanted = {name: fact for name, fact in there.items() if _is_wanted(name, there)}
        damaged = self._damaged() if self._trains else set()
        fetched = [
            name
            for name, fact in wanted.items()
            if manifest_of(name) in damaged or self._is_stale(name, here.get(name), fact, own)
        ]
        if light:
            fetched = [name for name in fetched if manifest_of(name) in (None, name)]
        lacking = self._lacking(there, here) - damaged if own else set()
        for name in [name for name in here if name not in wanted and manifest_of(name) not in lacking]:
            if not (own and self._is_ahead(name, here)):
                (self.folder / name).unlink()
        size = sum(wanted[name].size for name in fetched)
        check_space(self.folder, size, f"{self.remote.key}={self.remote.address}")

        def done(name: str) -> None:
            self.pairs[name] = Pair(self.stat(name), wanted[name])

        try:
            self.remote.get(fetched, self.folder, done)
        finally:  # after an interruption only the rest is copied
            self.save()
        _drop_empty(self.folder)
        self.pairs = {name: pair for name, pair in self.pairs.items() if name in wanted.keys() - lacking}
        self.save()

    def _session_there(self) -> str | None:
        with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
            return json.loads(self.remote.read(SESSION))["session"]
        return None

    def check_own(self) -> None:
        """Checks that the bucket still belongs to this session; call before replacing or deleting anything there.

        Raises:
            Overtaken: another session has begun there since.
        """
        there = self._session_there()
        if there not in (self._sessions or [None]):
            what = "another command has begun to train in" if there else f"{SESSION} was removed from"
            raise Overtaken(f"{what} {self.remote.address}; this one stops, and what it had not uploaded is lost")

    def _is_stale(self, name: str, here: Here | None, there: Fact, own: bool) -> bool:
        """Returns whether a file of the bucket must be downloaded."""
        pair, manifest_name = self.pairs.get(name), manifest_of(name)
        if here is None:
            return True
        own = own and not (manifest_name and self.is_up(manifest_name))  # a checkpoint does not change after its upload
        if own and name.startswith(LOGS) and here[0] < there.size:
            return True
        if pair is None:
            return not own  # if own, it was uploaded just before the session ended
        return (pair.there != there and (not own or pair.here == here)) or (pair.here != here and not own)

    def _damaged(self) -> set[str]:
        """Returns the manifests of the bucket's checkpoints that are damaged or missing here."""
        complete = {name: (self.folder / name).parent for name in self.there if manifest_of(name) == name}
        return {name for name, folder in complete.items() if manifest.find_damage(folder, int(folder.name))}

    def _lacking(self, there: dict[str, Fact], here: dict[str, Here]) -> set[str]:
        """Returns the manifests of checkpoints that were uploaded from here, and of which the bucket has lost a file.

        They count as not uploaded, and are uploaded again.
        """
        sealed = {manifest_of(name) for name in here if name not in there} & there.keys()
        return {name for name in sealed if name in here and self.pairs.get(name) == Pair(here[name], there[name])}

    def _is_ahead(self, name: str, here: dict[str, Here]) -> bool:
        """Returns whether a file missing from the bucket is still to be uploaded; a checkpoint's manifest decides."""
        name = manifest_of(name) or name
        return name not in self.pairs or self.pairs[name].here != here.get(name)

    def here(self) -> dict[str, Here]:
        """Returns every file of the local copy, except those deleted meanwhile."""
        found = {}
        for folder, _, files in os.walk(self.folder):  # os.walk skips a folder that vanishes
            for file in files:
                name = (pathlib.Path(folder) / file).relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    if name != RECORD:
                        found[name] = self.stat(name)
        return found

    def stat(self, name: str) -> Here:
        """Returns a file's size in bytes and its modification time.

        Raises:
            FileNotFoundError: there is no such file.
        """
        facts = (self.folder / name).stat()
        return facts.st_size, facts.st_mtime_ns

    def is_up(self, name: str) -> bool:
        """Returns whether the bucket has the current version of a local file."""
        with contextlib.suppress(FileNotFoundError):
            return name in self.pairs and name in self.there and self.pairs[name].here == self.stat(name)
        return False

    def uploaded(self, files: Iterable[tuple[str, Here]]) -> None:
        """Records that these versions of files are in the bucket, after listing it for their marks."""
        self.there = self.remote.files()
        self.pairs |= {name: Pair(here, self.there[name]) for name, here in files if name in self.there}
        self.pairs = {name: pair for name, pair in self.pairs.items() if name in self.there}
        self.save()

    def begin(self, session: str) -> None:
        """Writes the session's ID here and to the bucket, which also shows that the bucket is writable.

        If this is interrupted, the ID may or may not have arrived there, so the previous ID remains valid until then.

        Raises:
            UserError: the bucket or the record here cannot be written.
        """
        self._sessions.append(session)
        self.save()
        self.remote.write(SESSION, json.dumps({"session": session}).encode())
        self._sessions = [session]
        self.save()

    def save(self) -> None:
        """Writes the record of sessions and of files equal to the bucket's."""
        record = {"sessions": self._sessions, "files": dict(self.pairs)}
        scratch = self.folder / f"{RECORD}.new"
        try:
            scratch.write_text(json.dumps(record))
            scratch.replace(self.folder / RECORD)
        except OSError as error:
            raise UserError(f"{scratch} cannot be written: {error.strerror or one_line(error)}") from None

    def _recorded(self) -> tuple[list[str], dict[str, Pair]]:
        try:
            record: Any = json.loads((self.folder / RECORD).read_text())
            pairs = {name: Pair(tuple(here), Fact(*there)) for name, (here, there) in record["files"].items()}
            return [*map(str, record["sessions"])], pairs
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [], {}


class _Taken(TemporaryError):
    """The local copy is in use by another process."""


def _take(remote: Remote, trains: bool, held: contextlib.ExitStack) -> tuple[pathlib.Path, Claim]:
    """Returns the first unused local copy of an address, and its claim, which `held` holds; only one may be trained in.

    A training session that loses its claim ends the process. One that reads does not: it may be a notebook, and the
    next `find` takes another copy.
    """
    address, kind = remote.address, "train" if trains else "read"
    line = f"another command trains in {address}: {{}}; wait for its end, or choose another {remote.key}"
    taken = lambda who: _Taken(line.format(who))
    text = f"error: the copy of {address} on this machine was removed or taken over by another command; this one stops"
    lost = (lambda: leave(1, text)) if trains else lambda: None
    for number in itertools.count():
        folder = cache_folder() / "runs" / f"{folder_name(address)}-{kind}{number}"
        make_folder(folder, address)
        try:
            claim = held.enter_context(claimed(folder.parent, f".{folder.name}", taken, print, lost, waits=trains))
        except _Taken:
            if trains:
                raise
            continue
        return folder, claim
    raise AssertionError("there are more numbers than processes")


def _is_wanted(name: str, there: dict[str, Fact]) -> bool:
    if name.startswith(("superseded/", "checkpoints/")):
        return manifest_of(name) in there
    return name not in (SESSION, RECORD)


def _drop_empty(folder: pathlib.Path) -> None:
    """Removes empty folders."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


_read: dict[tuple[pathlib.Path, str], LocalCopy] = {}  # this process's local copies, by cache folder and address


def find(path: str, key: str = "--workdir", *, light: bool = False) -> pathlib.Path:
    """Returns the folder to read a run from: the path itself, or the updated local copy of a bucket address.

    Args:
        path: path or address as given by the user.
        key: name of the path in messages.
        light: of checkpoints in a bucket download only the manifests.

    Raises:
        UserError: the path or address cannot be used.
    """
    if not is_remote(path):
        return expand(path, key).absolute()
    place = cache_folder(), path
    if place in _read and _read[place].is_lost:
        _read.pop(place).close()
    if place not in _read:
        _read[place] = LocalCopy(path, key)
    _read[place].pull(light=light)
    return _read[place].folder


def is_local_copy(folder: pathlib.Path) -> bool:
    """Returns whether a folder is a local copy, of which each process has its own."""
    return folder.parent == cache_folder() / "runs"
