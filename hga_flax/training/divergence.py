"""Handles losses and gradients that are not finite: skips steps up to a limit, then ends the run at a known step."""

import collections
import math
import pathlib
import shlex
import sys
from collections.abc import Callable

from hga_flax.errors import UserError
from hga_flax.training.step import StepReport

# Steps in flight on the devices: enough to hide host latency, few enough to bound memory.
STEPS_IN_FLIGHT = 2


class Diverged(Exception):
    """Training cannot continue; the message says what was not finite, and at which step."""


class StepReports:
    """Reads the reports of steps slightly behind the devices, so that no step waits for the host.

    All processes get the same reports, and therefore stop at the same step.

    Args:
        limit: number of steps that may be skipped in the whole run (`training.skip_nonfinite`).
        skipped: number of steps skipped so far.
        say: called with one line for each skipped step.
    """

    def __init__(self, limit: int, skipped: int, say: Callable[[str], None]):
        self._limit, self._skipped, self._say = limit, skipped, say
        self._pending: collections.deque[tuple[int, StepReport]] = collections.deque()

    def add(self, step: int, report: StepReport) -> None:
        """Queues the report of a step that may still be running."""
        self._pending.append((step, report))

    def read(self, in_flight: int = STEPS_IN_FLIGHT) -> tuple[int, float] | None:
        """Waits for and reads all reports except those of the newest `in_flight` steps.

        Returns:
            The last step read and its loss, or None if there was none to read.

        Raises:
            Diverged: a step was not finite, and no more may be skipped.
        """
        newest = None
        while len(self._pending) > in_flight:
            step, report = self._pending.popleft()
            newest = step, float(report.loss)
            what = nonfinite(*newest, float(report.gradient_norm))
            if what is None:
                continue
            self._skipped += 1
            if self._skipped > self._limit:
                more = f" (the limit training.skip_nonfinite={self._limit} is reached)" if self._limit else ""
                raise Diverged(what + more)
            self._say(f"warning: {what}; the step is skipped ({self._skipped} of at most {self._limit})")
        return newest


def nonfinite(step: int, loss: float, gradient_norm: float) -> str | None:
    """Returns a phrase that names the first non-finite value of a step, or None."""
    if not math.isfinite(loss):
        return f"the loss of step {step} is {loss}"
    return None if math.isfinite(gradient_norm) else f"the gradient norm of step {step} is {gradient_norm}"


def explain(what: str, steps: list[int]) -> UserError:
    """Returns the error that ends a diverged run.

    Args:
        what: the value that was not finite, and its step.
        steps: steps of the checkpoints on disk.
    """
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint had been written"
    return UserError(
        f"training diverged: {what}; {kept}. Try a lower optimizer.learning_rate, a longer schedule.warmup_epochs or "
        f"optimizer.clip_norm. To find the operation that fails first, from step {steps[-1] if steps else 0}: "
        f"JAX_DEBUG_NANS=1 {command_line()}"
    )


def command_line() -> str:
    """Returns the shell command that started this process."""
    program = pathlib.Path(sys.argv[0])
    name = program.name if program.suffix == ".py" and program.parent.absolute() == pathlib.Path.cwd() else sys.argv[0]
    return shlex.join(["python", name, *sys.argv[1:]])
