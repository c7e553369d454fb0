"""Ranks checkpoints and decides which ones to keep."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any


def comparable(evaluations: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Returns those evaluations, by step, that are on the split and image size of the newest one."""
    newest = evaluations[max(evaluations)] if evaluations else {}
    return {step: evaluation for step, evaluation in evaluations.items() if is_comparable(evaluation, newest)}


def is_comparable(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether two evaluations are on one split and image size; those of older versions do not say."""
    return all(one[key] == other[key] for key in ("split", "image_size") if key in one and key in other)


def rank(metrics: Mapping[str, float | None]) -> tuple[float, float]:
    """Returns a sort key, best first: top-1 error, then loss, because errors on small splits often tie."""
    worst = lambda value: math.inf if value is None or not math.isfinite(value) else value
    return worst(metrics["top1_error"]), worst(metrics["loss"])


class LatestAndBest:
    """Orbax preservation policy: keeps the latest N checkpoints and the best of the evaluated ones.

    Args:
        latest: number of latest checkpoints to keep.
        metrics: returns the evaluation of a step, or None.
        dropped: called with each step that is not kept, before Orbax deletes it.
        unknown: the steps whose evaluation cannot be read; one may be the best, so they are kept.
    """

    def __init__(
        self,
        latest: int,
        metrics: Callable[[int], Mapping[str, Any] | None],
        dropped: Callable[[int], None] = lambda step: None,
        unknown: Container[int] = (),
    ):
        self._latest, self._metrics, self._dropped, self._unknown = latest, metrics, dropped, unknown

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns one boolean per checkpoint; Orbax passes `checkpoints` in order of step."""
        evaluated = {c.step: metrics for c in checkpoints if (metrics := self._metrics(c.step))}
        best = min(comparable(evaluated), key=lambda step: rank(evaluated[step]), default=None)
        latest = {c.step for c in checkpoints[-self._latest :]}
        keep = [c.step in latest or c.step == best or c.step in self._unknown for c in checkpoints]
        for checkpoint, kept in zip(checkpoints, keep, strict=True):
            if not kept:
                self._dropped(checkpoint.step)
        return keep
