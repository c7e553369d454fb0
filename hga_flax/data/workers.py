"""Batches from processes that read and decode in parallel, for `data.num_workers`."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from hga_flax.errors import UserError

ENDED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")  # Grain's error


def in_workers(batches: grain.MapDataset, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches that worker processes have made.

    The workers take whole batches in turn, so that batches hold the same examples as without workers.

    Raises:
        UserError: a worker was killed, or there is too little shared memory, or too few files may be open.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which our commands do not parse
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    workers_options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    dataset = batches.to_iter_dataset(options).mp_prefetch(workers_options, worker_init_fn=_end_with_parent)
    try:
        yield from undisturbed(dataset)
    except (RuntimeError, OSError) as error:
        if text := _explained(error, workers):
            raise UserError(text) from error
        raise


def _explained(error: Exception, workers: int) -> str | None:
    """Returns what ended the workers and what to do, or None if the error is not of that kind."""
    fewer = "or set data.num_workers to fewer, or to 0 to read in threads"
    small = "/dev/shm, which holds the batches of the data.num_workers processes, is too small; enlarge it "
    small += f"(docker run --shm-size=8g), {fewer}"
    if isinstance(error, OSError):
        if error.errno in (errno.EMFILE, errno.EAGAIN):
            limit = f"{error.strerror}; raise the limit (ulimit -n, ulimit -u), {fewer}"
            return f"data.num_workers={workers}: the processes cannot be started: {limit}"
        return small if error.errno == errno.ENOSPC and error.filename is None else None
    ended = ENDED.search(str(error))
    if ended is None:
        return None
    code = int(ended[1])
    if code == -signal.SIGBUS:  # the kernel's answer to a write to memory that is not there
        return small
    names = {-int(known): known.name for known in signal.Signals}  # without those for real time
    how = f"was ended by {names.get(code, f'signal {-code}')}" if code < 0 else f"ended with exit code {code}"
    how += ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    return f"one of the data.num_workers={workers} processes {how}; start the command again, {fewer}"


def undisturbed(dataset: grain.IterDataset) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches from worker processes that block signals, because Ctrl-C at a terminal is sent to all processes.

    The workers go on until this process, which handles the signal, has its last batch. Grain's threads start them
    when the first batch is read, and they inherit the signals blocked at that moment.
    """
    quiet = "ignore:resource_tracker"  # its warning that it frees what a killed worker has left
    sys.warnoptions.append(quiet)
    resource_tracker.ensure_running()  # if started later, it would unblock the signals
    sys.warnoptions.remove(quiet)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    with contextlib.closing(iter(dataset)) as batches:  # also if the first batch is an error: closing frees the memory
        try:
            batch = next(batches, None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while batch is not None:
            # Copied, because the batch is in memory shared with the workers, which leaks if JAX keeps it to the end.
            yield {name: np.array(value) for name, value in batch.items()}
            batch = next(batches, None)


def _end_with_parent(worker: int, workers: int) -> None:
    """Starts a thread that ends this worker process when its parent is gone, even if the parent was killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
