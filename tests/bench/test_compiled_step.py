import types

import jax
import pytest

from hga_flax.bench import compiled_step
from hga_flax.bench.compiled_step import roofline, training_step
from hga_flax.counting.compiled import Cost, cost
from hga_flax.errors import ConfigError
from hga_flax.platforms import programs_for
from hga_flax.processes.mesh import create_mesh
from hga_flax.training import trainer
from tests.training import tiny

V5E = types.SimpleNamespace(device_kind="TPU v5 lite")


@pytest.mark.medium
def test_the_step_that_is_compiled_is_the_trainings_over_all_devices():
    c, mesh = tiny.config(), tiny.mesh(2)
    step, state, batch = training_step(c, mesh)
    result = cost(step.trace(state, batch).lower().compile())
    assert set(result.collectives) == {"all-reduce"}
    assert result.flops > 0 and result.bytes_accessed > 0 and result.peak_memory_bytes > 0
    _, real, real_step = tiny.build(c, mesh)
    described = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert described(state) == described(real)
    assert step.lower(state, batch).as_text() == real_step.lower(state, batch).as_text()


def test_the_roofline_is_the_slowest_of_three():
    def bound(flops, moved, exchanged):
        measured = Cost(flops, moved, 0, {"all-reduce": {"count": 1, "bytes": exchanged}})
        return roofline(measured, V5E, 64, 8)

    assert bound(197e12, 0, 0)["roofline_s"] == pytest.approx(1) and bound(197e12, 0, 0)["bound"] == "compute"
    assert bound(197e12, 1638e9, 0)["images_per_s"] == pytest.approx(32)
    links = bound(1, 1, 200e9)
    assert links["bound"] == "links" and links["roofline_s"] == pytest.approx(2 * 7 / 8)


@pytest.mark.medium
def test_the_chips_of_the_topology_are_checked_and_not_those_that_are_here():
    c = tiny.config(training__batch_size=6, data__mixup=0.2)  # 8 devices are here
    with pytest.raises(ConfigError, match="each of the 2 devices needs an even number of images"):
        training_step(c, tiny.mesh(2))
    c = tiny.config(training__batch_size=4, data__mixup=0.2)
    step, state, batch = training_step(c, tiny.mesh(2))
    assert step.trace(state, batch)


def test_the_program_is_that_of_train_py(tmp_path, monkeypatch):
    """The step that a whole run compiles, and the one that `compile` compiles, are one text for a kind of device."""
    c, programs = tiny.config(training__steps=1, model__attention="se"), []

    class Enough(Exception):
        pass

    def keep(step, state, batch):
        programs.append(step.lower(state, batch).as_text())
        raise Enough

    monkeypatch.setattr(trainer, "compile_step", keep)
    with pytest.raises(Enough):
        trainer.train(c, str(tmp_path / "run"))
    monkeypatch.setattr(compiled_step, "IMAGENET", 48)  # the data set's size, by which the schedule knows its end
    step, state, batch = training_step(c, create_mesh())
    (text,) = programs
    with programs_for(jax.devices()[0]):
        assert step.trace(state, batch).lower().as_text() == text
