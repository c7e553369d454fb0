"""Time of a run: its start, images per second, the share spent waiting for data, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StartUp:
    """The parts of the time before the first step is done.

    Args:
        began: when the process began, by `time.monotonic()`.
    """

    def __init__(self, began: float):
        self._marks = [("", began)]

    def mark(self, part: str) -> None:
        """Ends a part, which began where the last one ended."""
        self._marks.append((part, time.monotonic()))

    def text(self) -> str:
        """Returns a line for a person, seconds in all and part by part."""
        ends = [end for _, end in self._marks]
        parts = zip(self._marks[1:], ends, strict=False)
        shown = ", ".join(f"{part} {end - start:.1f}" for (part, end), start in parts)
        return f"started in {ends[-1] - ends[0]:.1f} s: {shown}"


# Metrics of training that are times: all that may differ between two runs of one configuration.
TIMINGS = tuple(
    f"train/{name}"
    for name in ("images_per_second", "data_wait_share", "step_seconds", "data_wait_seconds", "checkpoint_seconds")
)


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
        self._waited = self._paused = self._saved = 0.0

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

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the time inside as held up by a checkpoint."""
        start = time.monotonic()
        yield
        self._saved += time.monotonic() - start

    def start(self, step: int) -> None:
        """Marks the end of the first step, which compiled: speed counts from here."""
        self._first = (step, time.monotonic())
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._window, self._waited, self._paused, self._saved = (step, time.monotonic()), 0.0, 0.0, 0.0

    def speed(self, step: int) -> dict[str, float]:
        """Returns what the steps since the last `reset` took; nothing before a whole step.

        `images_per_second`, `data_wait_share` (0..1), of one step `step_seconds` and, within it,
        `data_wait_seconds`, and `checkpoint_seconds`, of all checkpoints together. The first step of a
        session compiles and tells nothing about speed.
        """
        if step <= self._window[0]:
            return {}
        steps = step - self._window[0]
        seconds = max(time.monotonic() - self._window[1] - self._paused, 1e-9)
        return {
            "images_per_second": steps * self._batch / seconds,
            "data_wait_share": min(self._waited / seconds, 1.0),
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._waited / steps,
            "checkpoint_seconds": self._saved,
        }

    def reset(self, step: int) -> None:
        """Starts a new window of `speed`."""
        self._restart(step)

    def eta(self, step: int) -> float:
        """Returns the seconds left at the pace so far, evaluations and checkpoints included."""
        if self._first is None or step <= self._first[0]:
            return 0.0
        return (time.monotonic() - self._first[1]) / (step - self._first[0]) * (self._total - step)
