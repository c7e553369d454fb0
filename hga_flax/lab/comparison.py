"""Paired comparison of rows: the difference between two recipes and its uncertainty.

Rows are compared seed by seed: the seed determines the order and augmentation of the examples in both rows, so the
common effect cancels. The interval is Student's t interval for the mean difference. The p-values of all comparisons
in a study are corrected together by Holm's method (Scandinavian Journal of Statistics 6, 1979), so that the
probability of any false claim in the whole study is at most 1 - confidence.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95
ROUNDING = 1e-9  # relative; equal differences of errors such as 300/297 and 400/297 differ by less


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The mean of a row's values minus its baseline's, paired by seed.

    Attributes:
        pairs: number of seeds with values in both rows.
        difference: mean of the differences; None without pairs.
        low, high: ends of the interval; None for fewer than two pairs or if all differences are equal.
        p: two-sided p-value of "no difference"; None if there is no interval.
    """

    pairs: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval; smaller differences could not have been detected."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def is_finite(value: float | None) -> bool:
    """Returns whether a run has a value that counts; a diverged one has none, or NaN."""
    return value is not None and math.isfinite(value)


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean, or None for no values."""
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation (n - 1), or None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def compare(row: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE) -> Comparison:
    """Compares the values of two rows by seed; ignores non-finite values, such as those of diverged runs."""
    from scipy import stats  # takes half a second to import

    seeds = [seed for seed in row if seed in baseline and is_finite(row[seed]) and is_finite(baseline[seed])]
    differences = [row[seed] - baseline[seed] for seed in seeds]
    pairs, centre = len(differences), mean(differences)
    spread = deviation(differences)
    largest = max((abs(value) for seed in seeds for value in (row[seed], baseline[seed])), default=0.0)
    if not spread or spread <= ROUNDING * largest:  # one pair, or no variance: nothing is known of the distribution
        return Comparison(pairs, centre)
    error = spread / math.sqrt(pairs)
    half = float(stats.t.ppf((1 + confidence) / 2, pairs - 1)) * error
    p = 2 * float(stats.t.sf(abs(centre) / error, pairs - 1))
    return Comparison(pairs, centre, centre - half, centre + half, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns Holm-corrected p-values in the given order; None stays None and does not count as a comparison."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected


def verdict(comparison: Comparison, p_corrected: float | None, confidence: float = CONFIDENCE) -> str:
    """Returns the conclusion about a difference between errors, in words."""
    if comparison.pairs == 0:
        return "no pair yet"
    if comparison.pairs == 1:
        return "one seed: nothing can be said"
    if p_corrected is None:
        return "no variance: nothing can be said"
    if p_corrected >= 1 - confidence:
        return "not told apart"
    return "lower" if comparison.difference < 0 else "higher"
