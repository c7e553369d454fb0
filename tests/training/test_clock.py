import pytest

from hga_flax.training import clock as module


class Time:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    fake = Time()
    monkeypatch.setattr(module, "time", fake)
    return fake


def test_speed_counts_neither_compilation_nor_pauses(time):
    clock = module.Clock(total_steps=100, batch_size=10, elapsed=5.0)
    time.now += 60  # compiling the first step
    clock.start(1)
    assert clock.speed(1) == {}  # no step was measured yet
    with clock.waiting():
        time.now += 1
    time.now += 3
    with clock.paused():
        time.now += 100
    speed = clock.speed(9)
    assert speed == {"images_per_second": pytest.approx(80 / 4), "data_wait_share": pytest.approx(0.25)}
    assert clock.elapsed == pytest.approx(5 + 60 + 104)
    clock.reset(9)
    time.now += 2
    assert clock.speed(10) == {"images_per_second": pytest.approx(5), "data_wait_share": 0.0}


def test_eta_includes_evaluations(time):
    clock = module.Clock(total_steps=21, batch_size=1)
    assert clock.eta(0) == 0.0
    clock.start(1)
    time.now += 10
    with clock.paused():
        time.now += 10
    assert clock.eta(11) == pytest.approx(20)
