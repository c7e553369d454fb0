"""Handles SIGTERM, SIGINT and SIGHUP: finishes and saves the current step, and exits within the grace period.

Python runs a signal handler only between two instructions of the main thread, which may be inside a compilation for
minutes. So a separate thread is notified too, through the file descriptor that Python writes to at once
(signal.set_wakeup_fd), and ends the process when the grace period is over.
"""

import collections
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hga_flax.errors import Interrupted, leave
from hga_flax.processes.mesh import DATA_AXIS

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SLURM's --signal=USR1@60
# A process with nothing to save exits at once; inside a compilation it gets this many seconds.
NOTHING_TO_SAVE_SECONDS = 1.0
POLLS_IN_FLIGHT = 2
_DONE = 0  # a byte that is not a signal number


def exit_code(signum: int) -> int:
    """Returns a shell's exit code for a process ended by a signal: SIGTERM 143, SIGINT 130, SIGHUP 129, SIGUSR1 138."""
    return 128 + signum


def handled_signals() -> list[signal.Signals]:
    """Returns the signals that end this process cleanly: SIGNALS, without SIGHUP if it is ignored (nohup)."""
    return [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def survive_hangup() -> None:
    """After SIGHUP, redirects output that cannot be written to /dev/null: a lost terminal must not prevent saving."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(nowhere, number)
    os.close(nowhere)


class Preemption:
    """Context manager that turns signals into a request that the training loop checks.

    Does nothing outside the main thread, where Python cannot handle signals.

    Args:
        grace_seconds: time from the first signal to the end of the process, whatever it is doing.
        leave: called with (exit code, line to print) when time is up; tests replace it to stay alive.
    """

    def __init__(self, grace_seconds: float, leave: Callable[[int, str], None] = leave):
        self._grace, self._leave = grace_seconds, leave
        self._unsaved = False
        self.signal = 0  # the first signal received, or 0

    def begin(self) -> None:
        """Declares that from now on there are steps worth saving: a signal no longer ends the process at once."""
        self._unsaved = True

    def __enter__(self) -> "Preemption":
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._handlers = {signum: signal.signal(signum, self._handle) for signum in handled_signals()}
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, daemon=True, name="preemption")
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            signal.set_wakeup_fd(self._wakeup)
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
            os.write(self._pipe[1], bytes([_DONE]))
            self._thread.join()
            for end in self._pipe:
                os.close(end)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            survive_hangup()
        self.signal = self.signal or signum
        if not self._unsaved:
            raise Interrupted(
                f"stopped by {signal.Signals(signum).name}; nothing new to save, and the same command resumes",
                exit_code(signum),
                alone=True,
            )

    def _watch(self) -> None:
        """Runs in the thread: the first signal starts the grace period; its end or a later SIGINT ends the process."""
        first, deadline = 0, None
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._pipe[0]], [], [], left)
            if not ready:
                why = f"after {self._grace:g} s (training.grace_seconds)" if self._unsaved else "with nothing to save"
                self._leave(exit_code(first), f"stopped by {signal.Signals(first).name} {why}; {_KEPT}")
                return
            for byte in os.read(self._pipe[0], 64):
                if byte == _DONE:
                    return
                if byte == signal.SIGHUP and byte in self._handlers:
                    survive_hangup()  # at once: the main thread may be about to print
                if first and byte == signal.SIGINT:
                    self._leave(exit_code(byte), f"stopped at once by a second signal, SIGINT; {_KEPT}")
                    return
                if not first and byte in self._handlers:
                    self.signal = self.signal or byte
                    first = byte
                    grace = self._grace if self._unsaved else min(self._grace, NOTHING_TO_SAVE_SECONDS)
                    deadline = time.monotonic() + grace


_KEPT = "the checkpoints written before are kept, and the same command resumes from the newest"


class Agreement:
    """Tells all processes at the same step whether one of them has been asked to stop.

    Each `stop()` starts an all-reduce of one number and reads the one from POLLS_IN_FLIGHT calls ago, which has arrived
    by then: no process ever waits for it, and all stop at the same step. A single process knows at once.

    JAX's own `multihost_utils.reached_preemption_sync_point` knows only SIGTERM, whose handler it takes over, and
    does not say which signal came: Ctrl-C and SIGHUP would not be shared, nor would the exit code.

    Args:
        preemption: this process's `Preemption`.
        mesh: the mesh of all devices of all processes.
        processes: number of processes.
    """

    def __init__(self, preemption: Preemption, mesh: Mesh, processes: int):
        self._preemption, self._alone = preemption, processes == 1
        self._split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
        self._local = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._flags: collections.deque[jax.Array] = collections.deque()

    def stop(self) -> int:
        """Returns the signal for which all processes stop here, or 0; all must call it equally often."""
        if self._alone:
            return self._preemption.signal
        own = np.full(self._local, self._preemption.signal, np.int32)
        self._flags.append(self._largest(jax.make_array_from_process_local_data(self._split, own)))
        return int(self._flags.popleft()) if len(self._flags) > POLLS_IN_FLIGHT else 0
