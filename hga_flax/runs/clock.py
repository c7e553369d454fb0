"""Timing of a run: start-up, images per second, share of time spent waiting for data, time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StartUp:
    """Times the phases from the start of a command, or of a call, to the end of the first step.

    Args:
        began: the start, as a value of `time.monotonic()`.
    """

    def __init__(self, began: float):
        self._marks = [("", began)]

    def mark(self, part: str) -> None:
        """Ends a phase, which began where the last one ended."""
        self._marks.append((part, time.monotonic()))

    def text(self) -> str:
        """Returns a line to print: total seconds, and seconds per phase."""
        ends = [end for _, end in self._marks]
        parts = zip(self._marks[1:], ends, strict=False)
        shown = ", ".join(f"{part} {end - start:.1f}" for (part, end), start in parts)
        return f"started in {ends[-1] - ends[0]:.1f} s: {shown}"


# Training metrics that are times: the only ones that may differ between two runs of the same configuration.
TIMINGS = tuple(
    f"train/{name}"
    for name in ("images_per_second", "data_wait_share", "step_seconds", "data_wait_seconds", "checkpoint_seconds")
)


class Clock:
    """Measures training speed, excluding compilation, evaluation and checkpoints.

    Args:
        total_steps: step at which training ends.
        batch_size: images per step.
        elapsed: seconds spent in earlier sessions of this run.
    """

    def __init__(self, total_steps: int, batch_size: int, elapsed: float = 0.0):
        self._total, self._batch, self._before = total_steps, batch_size, elapsed
        self._session = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time at the end of the first step
        self._window = (0, self._session)
        self._waited = self._paused = self._saved = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken so far, over all its sessions."""
        return self._before + time.monotonic() - self._session

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts time in this context as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes time in this context from the training speed (evaluation, checkpoints)."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts time in this context as spent on a checkpoint."""
        start = time.monotonic()
        yield
        self._saved += time.monotonic() - start

    def start(self, step: int) -> None:
        """Marks the end of the first step, which includes compilation; speed is measured from here."""
        self._first = (step, time.monotonic())
        self.reset(step)

    def speed(self, step: int) -> dict[str, float]:
        """Returns the speed of the steps since the last `reset`, or {} before one is done.

        Keys: `images_per_second`; `data_wait_share` (0..1); `step_seconds` and the `data_wait_seconds` within it,
        both per step; `checkpoint_seconds`, the total of all checkpoints. The first step of a session is left
        out because it compiles.
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
        """Starts a new measuring window for `speed`."""
        self._window, self._waited, self._paused, self._saved = (step, time.monotonic()), 0.0, 0.0, 0.0

    def eta(self, step: int) -> float | None:
        """Returns the estimated seconds left at the pace so far, including evaluations and checkpoints.

        None before a second step is done.
        """
        if self._first is None or step <= self._first[0]:
            return None
        return (time.monotonic() - self._first[1]) / (step - self._first[0]) * (self._total - step)
