"""Time of a run: images per second, the share spent waiting for data, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Measures training apart from compilation, evaluation and checkpoints.

    Args:
        total_steps: where training ends.
        batch_size: images in each step.
        elapsed: seconds that earlier sessions of this run took.
    """

    def __init__(self, total_steps: int, batch_size: int, elapsed: float = 0.0):
        self._total, self._batch, self._before = total_steps, batch_size, elapsed
        self._session = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time at which the steady state began
        self._window = (0, self._session)
        self._waited = self._paused = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds that the run took so far, over all its sessions."""
        return self._before + time.monotonic() - self._session

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the training speed (evaluation, checkpoints)."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def start(self, step: int) -> None:
        """Marks the end of the first step, which compiled: speed counts from here."""
        self._first = (step, time.monotonic())
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._window, self._waited, self._paused = (step, time.monotonic()), 0.0, 0.0

    def speed(self, step: int) -> dict[str, float]:
        """Returns `images_per_second` and `data_wait_share` (0..1) since the last `reset`; nothing before a whole step.

        The first step of a session compiles and tells nothing about speed.
        """
        if step <= self._window[0]:
            return {}
        seconds = max(time.monotonic() - self._window[1] - self._paused, 1e-9)
        images = (step - self._window[0]) * self._batch
        return {"images_per_second": images / seconds, "data_wait_share": min(self._waited / seconds, 1.0)}

    def reset(self, step: int) -> None:
        """Starts a new window of `speed`."""
        self._restart(step)

    def eta(self, step: int) -> float:
        """Returns the seconds left at the pace so far, evaluations and checkpoints included."""
        if self._first is None or step <= self._first[0]:
            return 0.0
        return (time.monotonic() - self._first[1]) / (step - self._first[0]) * (self._total - step)
