"""Ranks checkpoints and decides which ones to keep."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


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
    """

    def __init__(
        self,
        latest: int,
        metrics: Callable[[int], Mapping[str, Any] | None],
        dropped: Callable[[int], None] = lambda step: None,
    ):
        self._latest, self._metrics, self._dropped = latest, metrics, dropped

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns one boolean per checkpoint; Orbax passes `checkpoints` in order of step."""
        evaluated = {c.step: metrics for c in checkpoints if (metrics := self._metrics(c.step))}
        best = min(evaluated, key=lambda step: rank(evaluated[step]), default=None)
        latest = {c.step for c in checkpoints[-self._latest :]}
        keep = [c.step in latest or c.step == best for c in checkpoints]
        for checkpoint, kept in zip(checkpoints, keep, strict=True):
            if not kept:
                self._dropped(checkpoint.step)
        return keep
