"""Claims: files in a shared folder that say which process owns what. Locks: for short work on one machine.

A claim needs no server, no file-system lock and no synchronised clocks. It is the file NAME.0, created exclusively:
only one process succeeds. Its owner touches it every few seconds. A process that finds the owner gone takes over by
creating NAME.1, again exclusively, and so on: the highest number counts. The highest file is never removed or renamed,
and a process that has created one checks that it is the highest, so only one of two processes that try to take over
succeeds, however late they are.

An owner is gone if its claim says that it was released; if it ran on this machine and its process no longer exists; or
if another process has watched the file for `stale_seconds` by its own clock and nobody has touched it.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from hga_flax.errors import UserError, one_line

STALE_SECONDS = 120.0
BEATS = 12  # touches per `stale_seconds`
NUMBERED = re.compile(r"(.+)\.(\d+)")
POLL_SECONDS = 1.0


def lock(file: pathlib.Path, wait: bool) -> TextIO | None:
    """Locks a file, creating it if needed, until the returned file is closed.

    The kernel releases the lock however the process ends; other machines may not see it.

    Args:
        file: the file to lock; its folder is created too.
        wait: whether to wait for another process that holds the lock.

    Returns:
        The open file, or None if another process holds the lock.

    Raises:
        OSError: the file cannot be created, or its file system has no locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = file.open("w")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    except OSError:
        opened.close()
        raise
    return opened


def machine() -> str:
    """Returns an identifier of this machine, its boot and its PID namespace, within which a process id is unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start(pid: int) -> str | None:
    """Returns an identifier that tells a process from a later one with the same id.

    None if it is not running, "" if /proc does not show it: there is none, or it hides the processes of other users.
    """
    try:
        state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@dataclasses.dataclass
class Claim:
    """A name that this process owns, from `Claims.take` to `release`.

    Attributes:
        file: the claim file.
        number: number of owners before this one.
        token: random text in the file, which a file of the same name that was made after this one's removal lacks.
    """

    file: pathlib.Path
    number: int
    token: str

    @property
    def is_lost(self) -> bool:
        """True if another process took over, because this one was suspended too long, or if the file was removed.

        Raises:
            OSError: the file server does not say.
        """
        name = NUMBERED.fullmatch(self.file.name)[1]
        if exists(self.file.with_name(f"{name}.{self.number + 1}")):
            return True
        try:
            return json.loads(self.file.read_text())["token"] != self.token
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return True


def exists(file: pathlib.Path) -> bool:
    """Returns whether a file exists; `Path.exists` takes any error for no, in some versions of Python."""
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class Claims:
    """The claims in a folder, as one process sees them.

    Args:
        folder: folder of the claim files, the same for all processes.
        stale_seconds: how long an owner may be silent before it counts as gone; the same for all processes.
        clock: returns the time in seconds; replaced in tests.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        stale_seconds: float = STALE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._stale, self._clock = folder, stale_seconds, clock
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}
        self._owner = {
            "machine": machine(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "folder": str(folder.absolute()),
            "start": process_start(os.getpid()),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            facts = folder.stat()
            self._owner["inode"] = [facts.st_dev, facts.st_ino]
        except OSError as error:
            raise UserError(f"{folder} cannot be created: {error.strerror}; name another directory") from None

    def take(self, name: str) -> Claim | None:
        """Claims a name, or takes it over from an owner that is gone; returns None if another process owns it.

        Raises:
            UserError: the claim cannot be written.
        """
        numbers = self._numbers(name)
        newest = max(numbers, default=None)
        if newest is not None and not self._is_gone(self._folder / f"{name}.{newest}"):
            return None
        number, made = 0 if newest is None else newest + 1, False
        file, token = self._folder / f"{name}.{number}", secrets.token_hex(8)
        try:
            with file.open("x") as stream:
                made = True
                stream.write(json.dumps(self._owner | {"token": token}))
            numbers = self._numbers(name)
            if max(numbers) > number:  # this process was so late that the claims it saw have been removed
                file.unlink(missing_ok=True)
                return None
            for old in numbers - {number}:
                (self._folder / f"{name}.{old}").unlink(missing_ok=True)
        except FileExistsError:
            return None
        except OSError as error:
            if made:  # an unfinished claim would hold up the next process
                with contextlib.suppress(OSError):
                    file.unlink()
            raise UserError(
                f"{file} cannot be written: {error.strerror or one_line(error)}; once that is mended, the same command "
                "goes on"
            ) from None
        return Claim(file, number, token)

    def release(self, claim: Claim) -> None:
        """Releases a claim, so that the next process need not wait."""
        with contextlib.suppress(OSError):
            if not claim.is_lost:
                with claim.file.open("r+") as stream:  # not emptied first, since the disk may be full
                    stream.write(json.dumps(self._owner | {"token": claim.token, "released": True}))

    @contextlib.contextmanager
    def beating(self, claim: Claim, tick: Callable[[], None]) -> Iterator[None]:
        """Touches a claim regularly while the context lasts.

        Args:
            claim: a claim of this process.
            tick: called after each touch, in a background thread.
        """
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._stale / BEATS):
                with contextlib.suppress(OSError):  # the file server may be away for a while
                    if not claim.is_lost:
                        os.utime(claim.file)
                with contextlib.suppress(OSError):
                    tick()

        thread = threading.Thread(target=beat, daemon=True, name="claim")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def owner(self, name: str) -> dict[str, Any]:
        """Returns the owner in the newest claim, with the keys "machine", "host", "pid"; {} if there is none."""
        newest = max(self._numbers(name), default=0)
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads((self._folder / f"{name}.{newest}").read_text())
            return owner if isinstance(owner, dict) else {}
        return {}

    def is_held(self, name: str) -> bool:
        """Returns whether a name has an owner that is not known to be gone; changes no file."""
        numbers = self._numbers(name)
        return bool(numbers) and not self._is_gone(self._folder / f"{name}.{max(numbers)}")

    def is_elsewhere(self, name: str) -> bool:
        """Returns whether the owner is out of sight, on another machine for one, so that only its silence tells."""
        return self._runs(self.owner(name)) is None

    def mark(self, name: str) -> tuple[int, int]:
        """Returns a value that changes with each sign of life of the owner."""
        newest = max(self._numbers(name), default=0)
        with contextlib.suppress(OSError):
            facts = (self._folder / f"{name}.{newest}").stat()
            return facts.st_mtime_ns, facts.st_size
        return 0, 0

    def _numbers(self, name: str) -> set[int]:
        """Returns the numbers of a name's claims."""
        found = (NUMBERED.fullmatch(file.name) for file in self._folder.glob(f"{glob.escape(name)}.*"))
        return {int(m[2]) for m in found if m and f"{name}.{int(m[2])}" == m[0]}

    def _is_copied(self, owner: dict[str, Any]) -> bool:
        """Returns whether an owner's claim came here in a copy of its folder, while the owner works in the original."""
        if owner.get("inode") == self._owner["inode"]:  # in a container its path may be that of another folder here
            return False
        with contextlib.suppress(OSError, KeyError, TypeError):
            return not os.path.samefile(owner["folder"], self._folder)
        return False

    def _runs(self, owner: dict[str, Any]) -> bool | None:
        """Returns whether the process of a claim runs and works here; None if only its silence can tell."""
        if owner.get("machine") != self._owner["machine"]:
            return None
        if self._is_copied(owner):
            return False
        start = process_start(owner["pid"])
        return None if start == "" and owner["start"] else start == owner["start"]

    def _is_gone(self, file: pathlib.Path) -> bool:
        mark, owner = (0, 0), {}
        with contextlib.suppress(OSError, ValueError):  # it is still being written, or its owner died while writing it
            facts = file.stat()
            mark = facts.st_mtime_ns, facts.st_size
            owner = json.loads(file.read_text())
        if not isinstance(owner, dict):
            owner = {}
        if owner.get("released"):
            return True
        if (runs := self._runs(owner)) is not None:
            return not runs
        seen, since = self._seen.get(file.name, (None, 0.0))
        if seen != mark:
            self._seen[file.name] = (mark, self._clock())
            return False
        return self._clock() - since > self._stale


@contextlib.contextmanager
def claimed(
    folder: pathlib.Path,
    name: str,
    taken: Callable[[str], UserError],
    say: Callable[[str], None],
    lost: Callable[[], None],
    *,
    waits: bool = True,
    stale_seconds: float = STALE_SECONDS,
) -> Iterator[Claim]:
    """Owns a name while the context lasts. If an owner on another machine may be gone, waits until that is known.

    Args:
        folder: folder of the claim files.
        name: the name to claim.
        taken: makes the error to raise from the name of the owner, "process 12 on host x".
        say: called with one line before waiting.
        lost: called in a background thread once another process has taken over.
        waits: False to assume that an owner on another machine is alive.
        stale_seconds: see `Claims`.

    Yields:
        The claim.

    Raises:
        UserError: another process owns the name, or the folder cannot be written to.
    """
    claims = Claims(folder, stale_seconds)
    claim, mark, said = claims.take(name), claims.mark(name), False
    while claim is None:
        owner = claims.owner(name)
        who = f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"
        if not waits or not claims.is_elsewhere(name) or (said and claims.mark(name) != mark):
            claim = claims.take(name)  # the owner may have ended just now
            if claim is None:
                raise taken(who)
            break
        if not said:
            say(f"{who} may still be at work here; waiting up to {stale_seconds:g} s for a sign of life")
            said = True
        time.sleep(min(POLL_SECONDS, stale_seconds / BEATS))
        claim = claims.take(name)
    with contextlib.ExitStack() as held:
        held.callback(claims.release, claim)
        held.enter_context(claims.beating(claim, lambda: lost() if surely_lost(claim) else None))
        # A script need not leave this context before it ends. Python would leave it for it, but too late: the thread
        # is frozen by then, and waiting for it never ends.
        atexit.register(held.close)
        try:
            yield claim
        finally:
            atexit.unregister(held.close)


def surely_lost(claim: Claim) -> bool:
    """Returns whether a claim is lost; False if the file server does not say."""
    with contextlib.suppress(OSError):  # the file server may be away for a while
        return claim.is_lost
    return False
