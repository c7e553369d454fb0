"""A run in a bucket has a twin on this machine, a folder with which everything works as with any workdir.

The bucket is the truth: opening a twin makes it what is there, and copies only what is not here already. Of the
checkpoints only those count that are complete there: a step's seal is uploaded last and deleted first.

The twin that a session trained in may be ahead of the bucket, where the session was killed or lost the network. That
is kept, and uploaded, if no other session has trained in the bucket since: each begins by leaving its number there
(session.json). What was uploaded once and is in the bucket no more was removed by somebody, and is not brought back.
What is damaged here is not ahead: a checkpoint that does not fit its seal, a log that is shorter than the bucket's.
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

from hga_flax.errors import UserError, expand, leave, one_line
from hga_flax.runs import manifest as seal
from hga_flax.storage.buckets import (
    Fact,
    Remote,
    cache_folder,
    check_space,
    folder_name,
    is_remote,
    make_folder,
)
from hga_flax.storage.locks import claimed

SESSION = "session.json"
RECORD = ".mirror.json"  # in a twin: what of it equals what in the bucket
CHECKPOINT = re.compile(r"((?:checkpoints|superseded)/\d+)/(.+)")  # folder, name in it
LOGS = ("metrics.jsonl", "tensorboard/")  # which grow; what the trainer cuts off them it cuts off again
TRIES = 3  # of reading a run that goes on meanwhile

Here = tuple[int, int]  # bytes and time of a file, which changes when it is written


class Pair(NamedTuple):
    """A file as it was here and there when the two were equal."""

    here: Here
    there: Fact


def seal_of(name: str) -> str | None:
    """Returns the seal of the checkpoint that a file belongs to, None where it belongs to none."""
    match = CHECKPOINT.fullmatch(name)
    return f"{match[1]}/{seal.NAME}" if match else None


class Overtaken(UserError):
    """A bucket that is another session's now."""


class Twin:
    """The twin of one address, of this process alone until it is closed.

    Args:
        address: of the run.
        key: what messages call it.
        trains: it is trained in; else it is read.

    Raises:
        UserError: another command trains there on this machine.

    Attributes:
        folder: the twin.
        remote: the bucket's folder.
        pairs: what is equal here and there, by name.
        there: the bucket's files when it was last asked.
    """

    def __init__(self, address: str, key: str, *, trains: bool = False):
        self.remote, self._trains = Remote(address, key), trains
        self.folder, self._claim = _take(self.remote, trains)
        self.there: dict[str, Fact] = {}
        self._sessions, self.pairs = self._recorded()

    def close(self) -> None:
        """Leaves the twin to the next process."""
        self._claim.close()

    def pull(self, *, light: bool = False) -> None:
        """Makes the twin what the bucket holds.

        Args:
            light: of the checkpoints only the seals, which tell what steps there are.

        Raises:
            UserError: the bucket cannot be read, or there is no room here.
        """
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError):  # the run goes on, and has removed an old checkpoint
                return self._pull(light=light)
        raise UserError(f"{self.remote.key}={self.remote.address}: it changes while it is read; try again")

    def _pull(self, light: bool) -> None:
        there = self.there = self.remote.files()
        own = self._trains and self._session_there() in self._sessions
        here = self.here()
        wanted = {name: fact for name, fact in there.items() if _is_wanted(name, there)}
        damaged = self._damaged() if self._trains else set()
        fetched = [
            name
            for name, fact in wanted.items()
            if seal_of(name) in damaged or self._is_stale(name, here.get(name), fact, own)
        ]
        if light:
            fetched = [name for name in fetched if seal_of(name) in (None, name)]
        for name in [name for name in here if name not in wanted and not (own and self._is_ahead(name, here))]:
            (self.folder / name).unlink()
        size = sum(wanted[name].size for name in fetched)
        check_space(self.folder, size, f"{self.remote.key}={self.remote.address}")
        self.remote.get(fetched, self.folder)
        _drop_empty(self.folder)
        here, old = self.here(), self.pairs
        kept = {name: old[name] for name in wanted if name in old and name not in fetched}
        self.pairs = kept | {name: Pair(here[name], wanted[name]) for name in fetched}
        self.save()

    def _session_there(self) -> str | None:
        with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
            return json.loads(self.remote.read(SESSION))["session"]
        return None

    def check_own(self) -> None:
        """Asked before anything in the bucket is replaced or removed.

        Raises:
            Overtaken: another session has begun there since.
        """
        there = self._session_there()
        if there not in (self._sessions or [None]):
            what = "another command has begun to train in" if there else f"{SESSION} was removed from"
            raise Overtaken(f"{what} {self.remote.address}; this one stops, and what it had not uploaded is lost")

    def _is_stale(self, name: str, here: Here | None, there: Fact, own: bool) -> bool:
        """Returns whether a file of the bucket must be copied."""
        pair, sealed = self.pairs.get(name), seal_of(name)
        if here is None:
            return True
        own = own and not (sealed and self.is_up(sealed))  # nothing of a checkpoint changes after its upload
        if own and name.startswith(LOGS) and here[0] < there.size:
            return True
        if pair is None:
            return not own  # else uploaded just before the session ended
        return (pair.there != there and (not own or pair.here == here)) or (pair.here != here and not own)

    def _damaged(self) -> set[str]:
        """Returns the seals of the checkpoints that the bucket has and that are damaged or absent here."""
        sealed = {name: (self.folder / name).parent for name in self.there if seal_of(name) == name}
        return {name for name, folder in sealed.items() if seal.find_damage(folder, int(folder.name))}

    def _is_ahead(self, name: str, here: dict[str, Here]) -> bool:
        """Returns whether a file that the bucket lacks has not been uploaded yet; a checkpoint's as its seal."""
        name = seal_of(name) or name
        return name not in self.pairs or self.pairs[name].here != here.get(name)

    def here(self) -> dict[str, Here]:
        """Returns every file of the twin, but for what is being removed meanwhile."""
        found = {}
        for folder, _, files in os.walk(self.folder):  # which passes over a folder that vanishes
            for file in files:
                name = (pathlib.Path(folder) / file).relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    if name != RECORD:
                        found[name] = self.stat(name)
        return found

    def stat(self, name: str) -> Here:
        """Returns a file's bytes and time.

        Raises:
            FileNotFoundError: it is not there.
        """
        facts = (self.folder / name).stat()
        return facts.st_size, facts.st_mtime_ns

    def is_up(self, name: str) -> bool:
        """Returns whether the bucket has a file of the twin as it is now."""
        with contextlib.suppress(FileNotFoundError):
            return name in self.pairs and name in self.there and self.pairs[name].here == self.stat(name)
        return False

    def uploaded(self, files: Iterable[tuple[str, Here]]) -> None:
        """Notes that files, as they were then, are in the bucket; asks it for their marks."""
        self.there = self.remote.files()
        self.pairs |= {name: Pair(here, self.there[name]) for name, here in files if name in self.there}
        self.pairs = {name: pair for name, pair in self.pairs.items() if name in self.there}
        self.save()

    def begin(self, session: str) -> None:
        """Leaves a session's number here and in the bucket, which also shows that the bucket can be written to.

        Whether it has arrived there is not known if this is cut short: until then the one before counts too.

        Raises:
            UserError: it cannot.
        """
        self._sessions.append(session)
        self.save()
        self.remote.write(SESSION, json.dumps({"session": session}).encode())
        self._sessions = [session]
        self.save()

    def save(self) -> None:
        """Writes what equals what."""
        record = {"sessions": self._sessions, "files": self.pairs}
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


class _Taken(UserError):
    """A twin that another process has."""


def _take(remote: Remote, trains: bool) -> tuple[pathlib.Path, contextlib.ExitStack]:
    """Returns the first twin of an address that no process has, and its claim; there is but one to train in."""
    address, kind = remote.address, "train" if trains else "read"
    line = f"another command trains in {address}: {{}}; wait for its end, or choose another {remote.key}"
    taken = lambda who: _Taken(line.format(who))
    lost = lambda: leave(1, f"error: another command has taken over the copy of {address} on this machine")
    for number in itertools.count():
        folder = cache_folder() / "runs" / f"{folder_name(address)}-{kind}{number}"
        make_folder(folder, address)
        claim = contextlib.ExitStack()
        try:
            claim.enter_context(claimed(folder.parent, f".{folder.name}", taken, print, lost, waits=trains))
        except _Taken:
            if trains:
                raise
            continue
        return folder, claim
    raise AssertionError("there are more numbers than processes")


def _is_wanted(name: str, there: dict[str, Fact]) -> bool:
    if name.startswith(("superseded/", "checkpoints/")):
        return seal_of(name) in there
    return name != SESSION


def _drop_empty(folder: pathlib.Path) -> None:
    """Removes the folders in which nothing is left."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


_read: dict[tuple[pathlib.Path, str], Twin] = {}  # of this process, by cache and address


def find(path: str, key: str = "--workdir", *, light: bool = False) -> pathlib.Path:
    """Returns the folder in which a run can be read: a path's own, or of an address the twin, brought up to date.

    Args:
        path: as the user gave it.
        key: what messages call it.
        light: of checkpoints in a bucket only the seals.

    Raises:
        UserError: it cannot be used.
    """
    if not is_remote(path):
        return expand(path, key).absolute()
    place = cache_folder(), path
    if place not in _read:
        _read[place] = Twin(path, key)
    _read[place].pull(light=light)
    return _read[place].folder


def is_twin(folder: pathlib.Path) -> bool:
    """Returns whether a folder is a twin, which each process has of its own."""
    return folder.parent == cache_folder() / "runs"
