"""JAX's client reaches the service of process 0 through its own process.

The client ends the process by an abort with a stack trace as soon as the operating system closes its
connection to the service, before or after watch.py has said with one line which process was lost. Nothing
public of JAX turns that off. So what is between them is passed on here, and the end of the service is not.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

CHUNK = 1 << 16  # bytes read at once


class Relay:
    """Passes on what goes to and comes from an address.

    Args:
        address: HOST:PORT of the service.
        lost: called once, in a thread, where the service closed a connection; the client's stays open.

    Attributes:
        address: HOST:PORT of this machine alone, where it listens.
    """

    def __init__(self, address: str, lost: Callable[[], None]):
        host, _, port = address.rpartition(":")
        self._service, self._lost = (host.strip("[]"), int(port)), lost
        self._lock, self._told = threading.Lock(), False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        _start(self._listen)

    def _listen(self) -> None:
        while True:
            near = self._listener.accept()[0]
            try:
                far = socket.create_connection(self._service)
            except OSError:
                near.close()  # the client tries again
                continue
            ended = threading.Event()
            _start(self._forth, near, far, ended)
            _start(self._back, near, far, ended)

    def _forth(self, near: socket.socket, far: socket.socket, ended: threading.Event) -> None:
        for data in _received(near):
            with contextlib.suppress(OSError):  # what a dead service misses does not matter
                far.sendall(data)
        ended.set()
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _back(self, near: socket.socket, far: socket.socket, ended: threading.Event) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            for data in _received(far):
                near.sendall(data)
        with self._lock:
            tell, self._told = not (self._told or ended.is_set()), True
        if tell:
            self._lost()


def _start(run: Callable, *arguments: object) -> None:
    threading.Thread(target=run, args=arguments, daemon=True, name="relay").start()


def _received(connection: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(OSError):
        while data := connection.recv(CHUNK):
            yield data
