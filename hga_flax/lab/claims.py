"""Who makes which run: claims as files in a shared folder, without a server and without trust in clocks.

The claim of a run is the file NAME.0, created exclusively: of all workers one succeeds. Its owner touches it every few
seconds. Whoever finds that the owner is gone takes the run over by creating NAME.1, exclusively again, and so
on: the highest number holds. No claim is ever removed or renamed, so that of two workers that want to take over
the same claim, however late, one succeeds.

An owner is gone when its claim says that it was released; when it ran on this machine and its process is no longer
there; or when this worker has watched the file for `stale_seconds` by its own clock and nobody has touched it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Callable

from hga_flax.errors import UserError, one_line

STALE_SECONDS = 120.0
BEATS = 12  # touches within `stale_seconds`
NUMBERED = re.compile(r"(.+)\.(\d+)")


def machine() -> str:
    """Returns what tells this machine, since its last start, from others: process numbers are valid within it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def process_start(pid: int) -> str | None:
    """Returns what tells a process from a later one of the same number, or None where it is not running."""
    try:
        state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        pass
    if pathlib.Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@dataclasses.dataclass
class Claim:
    """A run that is this worker's, from `Claims.take` to `release`.

    Attributes:
        file: of the claim.
        number: how many owners the run had before.
    """

    file: pathlib.Path
    number: int

    @property
    def is_lost(self) -> bool:
        """True where another worker took the run over, because this process did not run for so long."""
        name = NUMBERED.fullmatch(self.file.name)[1]
        return self.file.with_name(f"{name}.{self.number + 1}").exists() or not self.file.exists()


class Claims:
    """The claims of a study as one worker sees them.

    Args:
        folder: of the claim files, the same for all workers.
        stale_seconds: an owner that is silent for so long is gone; the same for all workers.
        clock: tells the seconds, for tests.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        stale_seconds: float = STALE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._stale, self._clock = folder, stale_seconds, clock
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}
        self._owner = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be created: {error.strerror}; name another directory") from None

    def take(self, name: str) -> Claim | None:
        """Claims a run, or takes it over from an owner that is gone; None where it is another's."""
        newest = self._newest(name)
        if newest is not None and not self._is_gone(newest):
            return None
        number = 0 if newest is None else int(NUMBERED.fullmatch(newest.name)[2]) + 1
        file = self._folder / f"{name}.{number}"
        try:
            with file.open("x") as stream:
                stream.write(json.dumps(self._owner))
        except FileExistsError:
            return None
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or one_line(error)}") from None
        return Claim(file, number)

    def release(self, claim: Claim) -> None:
        """Gives a run up, finished or not: the next worker need not wait."""
        with contextlib.suppress(OSError):
            claim.file.write_text(json.dumps(self._owner | {"released": True}))

    @contextlib.contextmanager
    def beating(self, claim: Claim, tick: Callable[[], None]):
        """Touches a claim while the run is made.

        Args:
            claim: the worker's own.
            tick: called after each touch, in another thread than the run's.
        """
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._stale / BEATS):
                if not claim.is_lost:
                    with contextlib.suppress(OSError):  # a file server that is away for a while
                        os.utime(claim.file)
                tick()

        thread = threading.Thread(target=beat, daemon=True, name="claim")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _newest(self, name: str) -> pathlib.Path | None:
        found = [(int(m[2]), f) for f in self._folder.glob(f"{name}.*") if (m := NUMBERED.fullmatch(f.name))]
        found = [(number, file) for number, file in found if file.name == f"{name}.{number}"]
        return max(found)[1] if found else None

    def _is_gone(self, file: pathlib.Path) -> bool:
        try:
            facts = file.stat()
            owner = json.loads(file.read_text())
        except (OSError, ValueError):  # it is being written, or its owner died before it had
            owner = {}
            facts = None
        if owner.get("released"):
            return True
        if owner.get("machine") == self._owner["machine"]:
            return process_start(owner["pid"]) != owner["start"]
        mark = (facts.st_mtime_ns, facts.st_size) if facts else (0, 0)
        seen, since = self._seen.get(file.name, (None, 0.0))
        if seen != mark:
            self._seen[file.name] = (mark, self._clock())
            return False
        return self._clock() - since > self._stale
