"""The statistics against SciPy's own, and what may not be said."""

import math

import numpy as np
import pytest
from scipy import stats

from hga_flax.lab.comparison import Comparison, compare, deviation, holm, mean, verdict


@pytest.mark.parametrize("seeds", [2, 3, 5, 30])
def test_interval_and_p_are_scipy_s(seeds):
    random = np.random.RandomState(seeds)
    base = random.normal(20, 1, seeds)
    ours = base + random.normal(-0.4, 0.5, seeds)
    known = stats.ttest_rel(ours, base)
    interval = known.confidence_interval(0.95)
    got = compare(dict(enumerate(ours)), dict(enumerate(base)))
    assert got.pairs == seeds
    assert got.difference == pytest.approx((ours - base).mean())
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high))
    assert got.p == pytest.approx(known.pvalue)
    assert got.half_width == pytest.approx((interval.high - interval.low) / 2)


def test_pairs_are_of_the_same_seed_whatever_the_order():
    base = {0: 10.0, 1: 20.0, 2: 30.0, 3: 40.0}
    got = compare({2: 29.0, 0: 9.2, 1: 18.9, 7: 99.0}, base)
    assert got.pairs == 3 and got.difference == pytest.approx(-(0.8 + 1.1 + 1.0) / 3) and got.p < 0.01


def test_one_seed_is_never_significant():
    got = compare({0: 0.0}, {0: 90.0})
    assert got == Comparison(1, -90.0) and got.half_width is None
    assert verdict(got, holm([got.p])[0]) == "one seed: nothing can be said"
    assert verdict(compare({0: 1.0}, {1: 2.0}), None) == "no pair yet"


def test_equal_differences_and_diverged_runs_say_nothing():
    assert verdict(compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}), None) == "no variance: nothing can be said"
    assert compare({0: 1.0, 1: math.nan}, {0: 2.0, 1: 3.0}).pairs == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.9]) == [0.04, None, 0.9] and holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_verdict_follows_the_corrected_p():
    lower, higher = Comparison(5, -0.5, -0.9, -0.1, 0.02), Comparison(5, 0.5, 0.1, 0.9, 0.02)
    assert [verdict(c, 0.04) for c in (lower, higher)] == ["lower", "higher"]
    assert verdict(lower, 0.08) == "not told apart"  # though its own interval leaves out 0


def test_one_false_claim_in_twenty_studies():
    """Nine comparisons without a difference: after Holm's correction at most 5 % of the studies claim one."""
    random, claimed = np.random.RandomState(0), 0
    for _ in range(300):
        base = dict(enumerate(random.normal(20, 1, 5)))
        p = [compare({s: v + random.normal(0, 0.5) for s, v in base.items()}, base).p for _ in range(9)]
        claimed += min(holm(p)) < 0.05
    assert claimed / 300 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_means():
    assert mean([]) is None and deviation([1.0]) is None
    assert mean([1.0, 2.0, 6.0]) == 3 and deviation([1.0, 2.0, 6.0]) == pytest.approx(np.std([1, 2, 6], ddof=1))


def test_equal_differences_that_round_otherwise_say_nothing():
    c = compare({0: 300 / 297, 1: 700 / 297}, {0: 0.0, 1: 400 / 297})
    assert (c.pairs, c.p) == (2, None) and c.difference == pytest.approx(300 / 297)
