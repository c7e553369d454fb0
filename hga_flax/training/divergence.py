"""Losses and gradients that are not finite: skipped up to a limit, then the end of the run at a known step."""

import collections
import math
import pathlib
import shlex
import sys
from collections.abc import Callable

from hga_flax.errors import UserError
from hga_flax.training.step import StepReport

# Steps that may be under way on the devices: enough to hide the host, few enough to bound memory.
STEPS_IN_FLIGHT = 2


class Diverged(Exception):
    """Training cannot go on; the message says what was not finite, and at which step."""


class StepReports:
    """Reads what the steps report, a little behind the devices, so that no step waits for the host.

    The reports are the same in all processes, and so is the step at which all of them stop.

    Args:
        limit: how many steps may be skipped over the run, of `training.skip_nonfinite`.
        skipped: how many were skipped before.
        say: called with one line for each skipped step.
    """

    def __init__(self, limit: int, skipped: int, say: Callable[[str], None]):
        self._limit, self._skipped, self._say = limit, skipped, say
        self._pending: collections.deque[tuple[int, StepReport]] = collections.deque()

    def add(self, step: int, report: StepReport) -> None:
        """Takes the report of a step that may still be under way."""
        self._pending.append((step, report))

    def read(self, in_flight: int = STEPS_IN_FLIGHT) -> tuple[int, float] | None:
        """Waits for all but the newest steps.

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
                more = f" (after {self._limit} skipped ones, training.skip_nonfinite)" if self._limit else ""
                raise Diverged(what + more)
            self._say(f"warning: {what}; the step is skipped, the {self._skipped}. of at most {self._limit}")
        return newest


def nonfinite(step: int, loss: float, gradient_norm: float) -> str | None:
    """Returns what is not finite about a step, or None."""
    if not math.isfinite(loss):
        return f"the loss of step {step} is {loss}"
    return None if math.isfinite(gradient_norm) else f"the norm of step {step}'s gradient is {gradient_norm}"


def explain(what: str, steps: list[int]) -> UserError:
    """Returns the error that ends a diverged run.

    Args:
        what: happened.
        steps: of the checkpoints that are kept.
    """
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint had been written"
    return UserError(
        f"training diverged: {what}; {kept}. Try a lower optimizer.learning_rate, a longer schedule.warmup_epochs or "
        f"optimizer.clip_norm. To see where it begins, from step {steps[-1] if steps else 0}: "
        f"JAX_DEBUG_NANS=1 {command_line()}"
    )


def command_line() -> str:
    """Returns the command that this process was started with, for a shell."""
    program = pathlib.Path(sys.argv[0])
    name = program.name if program.suffix == ".py" and program.parent.absolute() == pathlib.Path.cwd() else sys.argv[0]
    return shlex.join(["python", name, *sys.argv[1:]])
