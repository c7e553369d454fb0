import pytest

from hga_flax.bench.race import race, summarise


class Machine:
    """A clock, and work that takes its time by it; the machine gets slower all the time."""

    def __init__(self):
        self.now, self.turns = 0.0, []

    def clock(self):
        return self.now

    def work(self, name, seconds):
        def run(repeats):
            self.turns.append((name, repeats))
            for _ in range(repeats):
                self.now += seconds * (1 + self.now / 100)

        return run


def test_contenders_take_turns_and_drift_cancels():
    machine = Machine()
    timings = race([machine.work("a", 1.0), machine.work("b", 1.5)], 5, machine.clock)
    assert [name for name, _ in machine.turns] == ["a", "a", "b", "b"] * 6
    assert timings[0].ratio_to_first == 1
    assert timings[1].ratio_to_first == pytest.approx(1.5, rel=0.03)
    assert timings[0].fastest < timings[0].median and timings[0].spread > 0.05


def test_short_work_is_repeated_within_a_turn():
    machine = Machine()
    timings = race([machine.work("a", 0.01), machine.work("b", 0.5)], 2, machine.clock)
    assert machine.turns[4:] == [("a", 1), ("a", 20), ("b", 1), ("b", 1)] * 2
    assert timings[0].median == pytest.approx(0.01, rel=0.1)


def test_what_the_one_before_left_behind_is_not_timed():
    """As memory that has to be mapped anew: the first repetition after another contender's takes longer."""
    now, last = [0.0], [""]

    def work(name):
        def run(repeats):
            for _ in range(repeats):
                now[0] += 1.0 if last[0] == name else 3.0
                last[0] = name

        return run

    assert [timing.median for timing in race([work("a"), work("b")], 3, lambda: now[0])] == [1.0, 1.0]


def test_a_summary():
    timing = summarise([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 2.0, 5.0])
    assert (timing.median, timing.fastest) == (3.0, 1.0)
    assert timing.spread == pytest.approx(2 / 3)
    assert timing.ratio_to_first == 2.0
    assert summarise([2.0], [1.0]).spread == 0
