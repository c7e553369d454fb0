"""Also tests/data/test_pipeline.py: workers change no batch, hear of no signal, and end with their parent."""

import errno
import os
import signal

import grain
import numpy as np
import pytest

from hga_flax.data import workers
from hga_flax.errors import UserError


class Fatal:
    """Examples, of which reading the last one ends the process."""

    def __init__(self, signum):
        self.signum = signum

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), self.signum)
        return {"label": np.int32(index)}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("signum", "message"),
    [
        (
            signal.SIGKILL,
            r"^one of the data\.num_workers=1 processes was ended by SIGKILL, perhaps for lack of memory; ",
        ),
        (
            signal.SIGBUS,
            r"^/dev/shm, .* is too small; enlarge it \(docker run --shm-size=8g\), or set data\.num_workers",
        ),
    ],
)
def test_a_worker_that_is_killed_is_one_line(signum, message):
    batches = workers.in_workers(grain.MapDataset.source(Fatal(signum)).batch(2), 1)
    with pytest.raises(UserError, match=message):
        list(batches)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "^/dev/shm, .* is too small"),
        (OSError(errno.EMFILE, "Too many open files"), r"cannot be started: Too many open files; raise the limit"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code 3"), "ended with exit code 3;"),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -35"),
            "was ended by signal 35; start",
        ),
    ],
)
def test_what_stops_the_workers_is_one_line(monkeypatch, error, message):
    batches = grain.MapDataset.range(4).batch(2)
    monkeypatch.setattr(workers, "undisturbed", lambda dataset: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=message):
        list(workers.in_workers(batches, 2))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full", "file"), OSError(errno.EIO, "x"), RuntimeError("ours")]
)
def test_other_errors_are_passed_on(monkeypatch, error):
    monkeypatch.setattr(workers, "undisturbed", lambda dataset: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as raised:
        list(workers.in_workers(grain.MapDataset.range(4).batch(2), 2))
    assert raised.value is error


@pytest.mark.parametrize("good", [0, 1])
def test_workers_are_closed_when_reading_fails(good):
    """Otherwise the batches that they have ready would stay in shared memory."""
    closed = []

    class Batches:
        left = [{"label": np.zeros(1)}] * good

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise UserError("damaged")
            return self.left.pop()

        def close(self):
            closed.append(True)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(UserError, match="damaged"):
        list(workers.undisturbed(Batches()))
    assert closed == [True] and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
