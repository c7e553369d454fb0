"""Which checkpoints are the best, and which are kept."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def rank(metrics: Mapping[str, float | None]) -> tuple[float, float]:
    """Orders evaluations, the best first: by top-1 error; on small splits that often ties, so then by loss."""
    worst = lambda value: math.inf if value is None or not math.isfinite(value) else value
    return worst(metrics["top1_error"]), worst(metrics["loss"])


class LatestAndBest:
    """Orbax's question which checkpoints to keep, answered: the latest N and the best of those that were evaluated."""

    def __init__(self, latest: int, metrics: Callable[[int], Mapping[str, Any] | None]):
        self._latest, self._metrics = latest, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns a boolean for each of `checkpoints`, which Orbax orders by step."""
        evaluated = {c.step: metrics for c in checkpoints if (metrics := self._metrics(c.step))}
        best = min(evaluated, key=lambda step: rank(evaluated[step]), default=None)
        latest = {c.step for c in checkpoints[-self._latest :]}
        return [c.step in latest or c.step == best for c in checkpoints]
