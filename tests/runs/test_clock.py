import pytest

from hga_flax.runs import clock as module


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
        time.now += 70
        with clock.saving():
            time.now += 30
    assert clock.speed(9) == {
        "images_per_second": pytest.approx(80 / 4),
        "data_wait_share": pytest.approx(0.25),
        "step_seconds": pytest.approx(4 / 8),
        "data_wait_seconds": pytest.approx(1 / 8),
        "checkpoint_seconds": pytest.approx(30),
    }
    assert clock.elapsed == pytest.approx(5 + 60 + 104)
    clock.reset(9)
    time.now += 2
    speed = clock.speed(10)
    assert (speed["images_per_second"], speed["step_seconds"]) == (pytest.approx(5), pytest.approx(2))
    assert speed["data_wait_share"] == speed["data_wait_seconds"] == speed["checkpoint_seconds"] == 0.0


def test_eta_includes_evaluations(time):
    clock = module.Clock(total_steps=21, batch_size=1)
    assert clock.eta(0) is None  # unknown before a second step
    clock.start(1)
    time.now += 10
    with clock.paused():
        time.now += 10
    assert clock.eta(11) == pytest.approx(20)


def test_the_start_up_part_by_part(time):
    start_up = module.StartUp(time.now - 4)
    start_up.mark("imports")
    time.now += 1.25
    start_up.mark("first step")
    assert start_up.text() == "started in 5.2 s: imports 4.0, first step 1.2"
