"""The processes of a run watch each other: when one is lost, the others end with one clear line.

JAX's coordination service notices too, but ends a process by an abort with a stack trace, and a
collective that waits for a lost process may wait for ever. Here every process holds a connection to
process 0, over which a sign of life goes each way. The operating system closes the connection of a process
that dies, which is known at once; silence for longer than the timeout counts as loss too.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from hga_flax.errors import Interrupted, UserError, one_line

AFTER = "the checkpoints written before are kept; start all processes again with the same command"
CLOSED = "its connection is closed"
BEATS = 5  # signs of life within the timeout
CONCLUSION_SECONDS = 5.0  # a collective may fail a little before the watch knows why
LEAVE_SECONDS = 60.0  # that `before_leaving` has
ALIVE, DONE, FAILED, LOST, HELLO = "alive", "done", "failed", "lost", "hello"


_last_works: list[Callable[[], None]] = []


@contextlib.contextmanager
def before_leaving(work: Callable[[], None]) -> Iterator[None]:
    """Within it `leave` does `work` first, for a minute at most; errors in it are not told."""
    _last_works.append(work)
    try:
        yield
    finally:
        _last_works.remove(work)


def leave(text: str) -> None:
    """Ends the process from any thread: its main thread may be waiting for a process that is no more."""
    print(f"error: {text}", file=sys.stderr, flush=True)

    def finish() -> None:
        for work in list(_last_works):
            with contextlib.suppress(BaseException):
                work()

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)
    os._exit(1)


class Link:
    """A connection over which lines go, one message each."""

    def __init__(self, connection: socket.socket, process: int | None):
        self.socket, self.process = connection, process
        self.heard, self.done = time.monotonic(), False
        self._rest = b""

    def send(self, kind: str, text: str = "") -> None:
        """Sends a message; what a dead process misses does not matter."""
        with contextlib.suppress(OSError):  # reading tells that it is gone
            self.socket.sendall(f"{kind} {text}\n".encode())

    def receive(self) -> list[tuple[str, str]] | None:
        """Returns the messages that have come, None where the other end is gone."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = [line.decode(errors="replace").partition(" ") for line in lines]
        return [(kind, text) for kind, _, text in messages]


class Watch:
    """Used as a context around what several processes do together; alone it does nothing.

    An exception inside is told to the others, which end with it too.

    Args:
        process: this one.
        processes: how many there are.
        timeout_seconds: silence that counts as loss.
        connect: process 0 listens and the others connect; returns the links.
        leave: called with the line to print when another process is lost; a test's own does not end the process.
        disconnect: called at the end by all but process 0, which waits: their service runs there, and JAX aborts
            a process that cannot take its leave of it.
    """

    def __init__(
        self,
        process: int,
        processes: int,
        timeout_seconds: float,
        connect: Callable[[int, int, float], list[Link]] | None = None,
        leave: Callable[[str], None] = leave,
        disconnect: Callable[[], None] = lambda: None,
    ):
        self._process, self._alone, self._timeout, self._leave = process, processes == 1, timeout_seconds, leave
        self._disconnect = disconnect
        self._links: list[Link] = [] if self._alone else (connect or _connect)(process, processes, timeout_seconds)
        self._lock, self._lost, self._finished = threading.Lock(), threading.Event(), threading.Event()

    def __enter__(self) -> "Watch":
        if not self._alone:
            self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._alone:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and self._lost.wait(CONCLUSION_SECONDS):
            raise UserError("another process was lost") from None  # where `leave` does not end this one
        if self._process:
            self._disconnect()
        with self._lock:
            self._finished.set()
            # After a signal all stop at the same step, but before the first step only the one that it came to.
            orderly = error is None or (isinstance(error, Interrupted) and not error.alone)
            for link in self._links:
                link.send(DONE) if orderly else link.send(FAILED, f"{self._name()} {_told(error)}")
        self._thread.join(timeout=self._timeout)
        for link in self._links:
            link.socket.close()

    def _name(self) -> str:
        return f"process {self._process} on {socket.gethostname()}"

    def _run(self) -> None:
        """Runs in the thread: sends signs of life, and leaves when another process is lost."""
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link.socket, selectors.EVENT_READ, link)
            while selector.get_map():
                for key, _ in selector.select(self._timeout / BEATS):
                    messages = key.data.receive()
                    if messages is None and not key.data.done:
                        self._end(f"process {key.data.process} was lost ({CLOSED})")
                        return
                    for kind, text in messages or ():
                        if kind == FAILED:
                            self._finished.wait(CONCLUSION_SECONDS)  # it may know the same, and have files to close
                        if kind in (FAILED, LOST):
                            self._end(text, kind)
                            return
                        key.data.done |= kind == DONE
                    if messages is None or key.data.done:
                        selector.unregister(key.fileobj)
                for link in [key.data for key in selector.get_map().values()]:
                    if time.monotonic() - link.heard > self._timeout:
                        self._end(
                            f"process {link.process} was lost (silent for {self._timeout:g} s, "
                            "training.lost_process_seconds)"
                        )
                        return
                with self._lock:
                    if self._finished.is_set() and self._process:
                        return
                    for link in self._links:
                        link.send(ALIVE)

    def _end(self, text: str, kind: str = LOST) -> None:
        with self._lock:
            if self._finished.is_set():
                return  # this process is done, or says itself what went wrong
            for link in self._links:  # process 0 tells all, so that every one knows the cause
                link.send(kind, text)
        self._lost.set()
        self._leave(f"{text}; {AFTER}")


def _told(error: BaseException) -> str:
    """Returns what the others say of this process."""
    if isinstance(error, Interrupted):
        return f"was {one_line(error).partition(';')[0]}"  # "stopped by SIGTERM"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"failed: {kind}{one_line(error)[:500]}"


def _connect(process: int, processes: int, timeout_seconds: float) -> list[Link]:
    """Connects all processes with process 0, which every process reaches: JAX's coordinator runs there."""
    from jax._src.distributed import global_state  # the address is nowhere public

    host = (global_state.coordinator_address or "localhost:0").rpartition(":")[0].strip("[]")
    listener = socket.create_server(("", 0), backlog=processes) if process == 0 else None
    port = listener.getsockname()[1] if listener else 0
    port = int(multihost_utils.broadcast_one_to_all(np.int32(port)))
    if listener is None:
        link = Link(socket.create_connection((host, port), timeout=timeout_seconds), 0)
        link.send(HELLO, str(process))
        return [link]
    links = []
    with listener:
        listener.settimeout(timeout_seconds)
        while len(links) < processes - 1:
            link = Link(listener.accept()[0], None)
            link.socket.settimeout(timeout_seconds)
            (kind, number), *_ = link.receive() or [("", "")]
            if kind == HELLO and number.isdecimal():  # whoever else finds the port is not one of us
                link.process = int(number)
                links.append(link)
    return links
