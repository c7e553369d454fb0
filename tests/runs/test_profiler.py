import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from hga_flax.runs.profiler import Profiler


def run(profiler, steps):
    """Steps of a training that ends early."""
    function = jax.jit(lambda x: jnp.sin(x) @ x)
    result = jnp.ones((8, 8))
    for number in range(1, steps + 1):
        with profiler.step(number):
            result = function(result)
        profiler.after(number, result)
    profiler.close()


@pytest.mark.parametrize(("steps", "traced"), [(6, {"3", "4"}), (3, {"3"})])
def test_the_trace_holds_the_steps_asked_for_where_tensorboard_looks(tmp_path, steps, traced):
    lines = []
    run(Profiler(tmp_path, 3, 2, lines.append), steps)
    (folder,) = (tmp_path / "plugins" / "profile").iterdir()
    assert list(folder.glob("*.xplane.pb"))  # what the profile page reads
    with gzip.open(next(folder.glob("*.trace.json.gz"))) as file:
        events = json.load(file)["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == traced
    assert len(lines) == 1 and str(tmp_path) in lines[0]


def test_training_that_ends_before_the_first_traced_step_says_so(tmp_path):
    lines = []
    run(Profiler(tmp_path, 3, 2, lines.append), 2)
    assert lines == ["profile: no step was traced, since training ended before step 3"]


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, fails):
    calls, lines = [], []

    def call(name):
        calls.append(name)
        if name == fails:
            raise RuntimeError("OUT_OF_RANGE: vm.xplane.pb; File too large")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *folder, name=name: call(name))
    run(Profiler(tmp_path, 2, 2, lines.append), 5)
    assert lines == ["warning: the profile cannot be written: OUT_OF_RANGE: vm.xplane.pb; File too large"]
    assert calls == ["start_trace", "stop_trace"][: 1 + (fails == "stop_trace")]


def test_nothing_is_traced_unless_asked_for(tmp_path):
    lines = []
    run(Profiler(tmp_path, 0, 5, lines.append), 3)
    assert not lines and not list(tmp_path.iterdir())
