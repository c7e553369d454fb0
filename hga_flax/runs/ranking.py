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
    """

    def __init__(self, latest: int, metrics: Callable[[int], Mapping[str, Any] | None]):
        self._latest, self._metrics = latest, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns one boolean per checkpoint; Orbax passes `checkpoints` in order of step."""
        evaluated = {c.step: metrics for c in checkpoints if (metrics := self._metrics(c.step))}
        best = min(evaluated, key=lambda step: rank(evaluated[step]), default=None)
        latest = {c.step for c in checkpoints[-self._latest :]}
        return [c.step in latest or c.step == best for c in checkpoints]
