"""Paired comparison of rows: what a difference between two recipes is, and how sure that is.

Rows are compared seed by seed, for the seed decides the order of the examples and their augmentation in both:
what that does to both cancels. The interval is Student's t for the mean of the differences; the p-values of all
comparisons of a study are corrected together by Holm's method (Scandinavian Journal of Statistics 6, 1979), so
that the chance of one false claim or more in the whole study is at most 1 - confidence.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The mean of a row's values minus its baseline's, paired by seed.

    Attributes:
        pairs: seeds that both have.
        difference: mean of the differences, None without a pair.
        low, high: of the interval, None where there is none: fewer than two pairs, or differences that do not vary.
        p: two-sided p-value of "no difference", None where there is no interval.
    """

    pairs: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length: differences below it could not have been seen."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample (n - 1), None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def compare(row: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE) -> Comparison:
    """Compares two rows' values by seed; a value that is not finite, as of a diverged run, makes no pair."""
    from scipy import stats  # half a second

    seeds = [seed for seed in row if seed in baseline and math.isfinite(row[seed]) and math.isfinite(baseline[seed])]
    differences = [row[seed] - baseline[seed] for seed in seeds]
    pairs, centre = len(differences), mean(differences)
    spread = deviation(differences)
    if not spread:  # one pair, or differences without any variance, which tells nothing of their distribution
        return Comparison(pairs, centre)
    error = spread / math.sqrt(pairs)
    half = float(stats.t.ppf((1 + confidence) / 2, pairs - 1)) * error
    p = 2 * float(stats.t.sf(abs(centre) / error, pairs - 1))
    return Comparison(pairs, centre, centre - half, centre + half, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns Holm's corrected p-values in the order given; a comparison without one does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected


def verdict(comparison: Comparison, p_corrected: float | None, confidence: float = CONFIDENCE) -> str:
    """Returns what may be said of a difference between errors."""
    if comparison.pairs == 0:
        return "no pair yet"
    if comparison.pairs == 1:
        return "one seed: nothing can be said"
    if p_corrected is None:
        return "no variance: nothing can be said"
    if p_corrected >= 1 - confidence:
        return "not told apart"
    return "lower" if comparison.difference < 0 else "higher"
