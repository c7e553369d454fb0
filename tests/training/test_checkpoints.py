import functools

import jax
import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.training.checkpoints import Checkpoints
from tests.training import tiny


def metrics(error, loss=1.0):
    return {"top1_error": error, "top5_error": 0.0, "loss": loss}


@functools.cache
def initial(**overrides):
    return tiny.build(tiny.config(**overrides), tiny.mesh())[1]


def state(value=0.0, **overrides):
    return jax.tree.map(lambda a: a + np.asarray(value, a.dtype), initial(**overrides))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_what_is_restored_is_what_was_saved(tmp_path):
    checkpoints, run = Checkpoints(tmp_path), {"examples_seen": 7, "best": None, "elapsed_seconds": 1.5}
    checkpoints.save(3, state(2), run, None)
    step, restored, read_run = checkpoints.restore_latest(state())
    checkpoints.close()
    assert step == 3 and read_run == run and same(restored, state(2))


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, error, loss in [(1, 9.0, 1.0), (2, 5.0, 2.0), (3, 5.0, 1.0), (4, 5.0, 3.0), (5, 7.0, 1.0), (6, 8.0, 1.0)]:
        checkpoints.save(step, state(step), {}, metrics(error, loss))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5, 6]
    assert checkpoints.best_step() == 3  # the lower loss decides among equal errors
    assert checkpoints.metrics(5)["top1_error"] == 7.0
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2, read_only=True)
    assert again.best_step() == 3


def test_unevaluated_checkpoints_are_not_kept_for_ever(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, state(step), {}, metrics(5.0) if step == 1 else None)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4, 5]
    checkpoints.close()


def damage(folder, kind):
    files = [f for f in (folder / "state").rglob("*") if f.is_file()]
    if kind == "truncated":
        for f in files:
            f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    elif kind == "empty":
        for f in files:
            f.write_bytes(b"")
    elif kind == "no arrays":
        for f in (folder / "state").rglob("d/*"):
            f.unlink()
    else:
        (folder / "state" / "_METADATA").unlink()


@pytest.mark.parametrize("kind", ["truncated", "empty", "no arrays", "no metadata"])
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, kind):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"examples_seen": step}, metrics(5.0))
    checkpoints.close()
    damage(tmp_path / "checkpoints" / "2", kind)
    said = []
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    step, restored, run = checkpoints.restore_latest(state())
    assert step == 1 and run == {"examples_seen": 1} and same(restored, state(1))
    assert len(said) == 1 and "cannot be read" in said[0] and "/2" in said[0] and "\n" not in said[0]
    checkpoints.close()
    damage(tmp_path / "checkpoints" / "1", kind)
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        checkpoints.restore_latest(state())
    checkpoints.close()


@pytest.mark.parametrize(
    "other",
    [{"model__attention": "none"}, {"model__options": "features=8"}, {"model__name": "cifar_resnet14"}],
)
def test_another_models_checkpoint_is_refused(tmp_path, other):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {}, None)
    checkpoints.wait()
    with pytest.raises(UserError, match="belongs to another model: ") as caught:
        checkpoints.restore_latest(state(**other))
    assert "\n" not in str(caught.value)
    checkpoints.close()


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(state()) is None
    assert checkpoints.steps() == [] and checkpoints.best_step() is None
    checkpoints.close()


def test_a_state_moves_between_numbers_of_devices(tmp_path):
    _, eight, _ = tiny.build(tiny.config(), tiny.mesh(8))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, eight, {}, None)
    _, restored, _ = checkpoints.restore_latest(state())
    assert same(restored, eight)
    assert jax.tree.leaves(restored.params)[0].sharding.device_set == {jax.devices()[0]}
    checkpoints.close()
