"""The evaluations saved with checkpoints: which is the best, and which checkpoints are kept."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hga_flax.errors import UserError
from hga_flax.runs.manifest import RemovedCheckpoint, UnreadableCheckpoint


def comparable(evaluations: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Returns those evaluations, by step, that are of the same images as the newest one."""
    newest = evaluations[max(evaluations)] if evaluations else {}
    return {step: evaluation for step, evaluation in evaluations.items() if is_comparable(evaluation, newest)}


def is_comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two evaluations are of the same images, prepared alike; older ones do not say all."""
    both = one.keys() & other.keys() & {"split", "split_size", "split_digest", "image_size", "crop_fraction"}
    return all(one[key] == other[key] for key in both)


def rank(metrics: Mapping[str, float | None]) -> tuple[float, float]:
    """Returns a sort key, best first: top-1 error, then loss, because errors on small splits often tie."""
    worst = lambda value: math.inf if value is None or not math.isfinite(value) else value
    return worst(metrics["top1_error"]), worst(metrics["loss"])


class Evaluations:
    """The evaluations saved with the checkpoints of one workdir; each is read once.

    Args:
        read: returns the evaluation of a step, or None if the step was not evaluated. It raises an
            `UnreadableCheckpoint` if the checkpoint is damaged, a `RemovedCheckpoint` (passed on) if training has
            removed it since, and another `UserError` if it may be readable later.
        warn: called with one line for each checkpoint whose evaluation cannot be read.

    Attributes:
        unknown: steps whose evaluation could not be read, and may be readable later.
    """

    def __init__(self, read: Callable[[int], dict[str, Any] | None], warn: Callable[[str], None]):
        self._read, self._warn = read, warn
        self._known: dict[int, dict[str, Any] | None] = {}
        self.unknown: set[int] = set()

    def __getitem__(self, step: int) -> dict[str, Any] | None:
        """Returns the evaluation of a step; None if there is none or (with a warning) it cannot be read."""
        if step not in self._known:
            try:
                evaluation = self._read(step)
            except RemovedCheckpoint:
                raise  # what took its place may be better
            except UserError as error:
                if step not in self.unknown:
                    self._warn(f"warning: {error}; its evaluation is not known")
                if not isinstance(error, UnreadableCheckpoint):
                    self.unknown.add(step)
                    return None
                evaluation = None
            # Older versions recorded evaluations of zero images, with a null error.
            self._known[step] = evaluation if evaluation and evaluation["top1_error"] is not None else None
            self.unknown.discard(step)
        return self._known[step]

    def __setitem__(self, step: int, evaluation: dict[str, Any] | None) -> None:
        self._known[step] = evaluation

    def forget(self, step: int) -> None:
        """Reads the evaluation of a step again the next time."""
        self._known.pop(step, None)

    def best_first(self, steps: Iterable[int]) -> list[int]:
        """Returns the evaluated ones of these steps, the best first: those that are comparable with the newest."""
        evaluated = comparable({step: evaluation for step in steps if (evaluation := self[step])})
        return sorted(evaluated, key=lambda step: rank(evaluated[step]))


class LatestAndBest:
    """Orbax preservation policy: keeps the latest N checkpoints and the best of the evaluated ones.

    Those whose evaluation cannot be read are kept too, since one of them may be the best.

    Args:
        latest: number of latest checkpoints to keep.
        evaluations: the evaluations of the checkpoints.
        dropped: called with each step that is not kept, before Orbax deletes it.
    """

    def __init__(self, latest: int, evaluations: Evaluations, dropped: Callable[[int], None] = lambda step: None):
        self._latest, self._evaluations, self._dropped = latest, evaluations, dropped

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns one boolean per checkpoint; Orbax passes `checkpoints` in order of step."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self._evaluations.best_first(steps)[:1]
        kept = {*steps[-self._latest :], *best, *self._evaluations.unknown}
        for step in steps:
            if step not in kept:
                self._dropped(step)
        return [step in kept for step in steps]
