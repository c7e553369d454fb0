import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.config.loading import build_model
from hga_flax.errors import Interrupted, UserError
from hga_flax.runs import checkpoints as module
from hga_flax.runs import sharing
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.manifest import RemovedCheckpoint, UnreadableCheckpoint, write_manifest
from hga_flax.training.optimizer import create_optimizer
from hga_flax.training.state import abstract_state, make_init
from tests.runs.damage import DAMAGE
from tests.training import tiny


def metrics(error, loss=1.0):
    return {"top1_error": error, "top5_error": 0.0, "loss": loss}


@functools.cache
def initial(**overrides):
    return tiny.build(tiny.config(**overrides), tiny.mesh())[1]


def abstract(**overrides):
    c = tiny.config(**overrides)
    optimizer = create_optimizer(c, optax.constant_schedule(0.1))
    return abstract_state(
        make_init(build_model(c, 10), optimizer, (8, 8, 1), ema=c.training.ema_decay > 0), tiny.mesh()
    )


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


def small(value):
    """A state that is saved and read in no time."""
    return {
        "params": {"a": jnp.arange(3000, dtype=jnp.float32) * value, "b": jnp.full((4,), float(value))},
        "opt_state": jnp.full((7,), float(value)),
    }


@pytest.mark.parametrize("kind", DAMAGE)
def test_after_damage_the_newest_whole_checkpoint_is_restored_aloud(tmp_path, kind, capfd):
    damage, expected, message = DAMAGE[kind]
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, small(step), {"examples_seen": step}, metrics(5.0))
    checkpoints.close()
    damage(tmp_path / "checkpoints" / "2")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    said = []
    checkpoints = Checkpoints(tmp_path, read_only=True, warn=said.append)
    step, restored, run = checkpoints.restore_latest(small(0))
    assert (step, run) == (expected, {"examples_seen": expected}) and same(restored, small(expected))
    assert (len(said) == 1 and message in said[0] and "\n" not in said[0]) if message else said == []
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path, warn=lambda text: None)  # a run goes on: it can save all the steps to come
    step, restored, _ = checkpoints.restore_latest(small(0))
    assert step == expected and same(restored, small(expected))
    for later in range(step + 1, 4):
        checkpoints.save(later, small(later + 10), {"examples_seen": later}, metrics(6.0))
    checkpoints.wait()
    assert checkpoints.restore_latest(small(0))[0] == 3
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.best_step() == 1
    assert same(checkpoints.restore(2, small(0))[0], small(2 if expected == 2 else 12))
    checkpoints.close()
    if message and "gone" not in message:
        assert len(list((tmp_path / "damaged").iterdir())) == 1  # kept, out of the way
    assert "Traceback" not in (noise := capfd.readouterr().err) and "Event loop" not in noise


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if DAMAGE[kind][1] == 1])
def test_where_nothing_reads_a_run_never_starts_from_zero(tmp_path, kind):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, small(2), {}, None)
    checkpoints.close()
    DAMAGE[kind][0](tmp_path / "checkpoints" / "2")
    for _ in range(2):  # a second try finds what the first one found
        checkpoints = Checkpoints(tmp_path, warn=lambda text: None)
        with pytest.raises(UserError, match=r"none of the 1 checkpoints|but this run had one of step 2; put it back"):
            checkpoints.restore_latest(small(0))
        checkpoints.close()


def test_arrays_that_orbax_did_not_join_are_not_sealed(tmp_path, monkeypatch):
    """In a folder that it takes for a pattern it finds none of its files, and only warns."""
    with pytest.raises(UserError, match=r"may be lost below a path with \["):
        Checkpoints(tmp_path / "[1]")
    monkeypatch.setattr(module, "check_name", lambda folder: None)
    checkpoints = Checkpoints(tmp_path / "[1]")
    checkpoints.save(1, small(1), {}, None)
    with pytest.raises(UserError, match=r"step 1 cannot be written .* Orbax has not joined the arrays"):
        checkpoints.wait()
    checkpoints.close()
    assert Checkpoints(tmp_path / "[1]", read_only=True).steps() == []


def test_an_unreadable_file_is_damage(tmp_path, monkeypatch):
    checkpoints, said = Checkpoints(tmp_path, warn=lambda text: said.append(text)), []
    for step in (1, 2):
        checkpoints.save(step, small(step), {}, None)
    checkpoints.wait()
    original = pathlib.Path.open

    def refuse(self, *arguments, **options):  # as for a user without the right; root reads everything
        if self.parts[-3:] == ("2", "run", "metadata"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    assert checkpoints.restore_latest(small(0))[0] == 1
    assert "2/run/metadata cannot be read: Permission denied" in said[0]
    checkpoints.close()


def test_of_several_processes_none_falls_back_alone(tmp_path, monkeypatch):
    """Process 0 compares the files for all of them; an error of reading is seen by one process only."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, small(step), {}, None)
    checkpoints.wait()

    def fails(self, path, like):
        raise UnreadableCheckpoint(f"checkpoint {path} cannot be read: Input/output error")

    monkeypatch.setattr(Checkpoints, "_check_whole", lambda *arguments: None)
    monkeypatch.setattr(Checkpoints, "_restore", fails)
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"2 cannot be read: Input/output error; this is process 0, .* no other"):
        checkpoints.restore_latest(small(0))
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    checkpoints.close()


def test_damage_that_only_orbax_notices_is_passed_over_too(tmp_path):
    checkpoints, said = Checkpoints(tmp_path, warn=lambda text: said.append(text)), []
    for step in (1, 2):
        checkpoints.save(step, small(step), {}, None)
    checkpoints.wait()
    folder = tmp_path / "checkpoints" / "2"
    (folder / "state" / "_METADATA").write_text("{")
    write_manifest(folder, 2)
    assert checkpoints.restore_latest(small(0))[0] == 1
    assert "checkpoints/2 cannot be read: " in said[0] and "damaged/2" in said[1]
    checkpoints.close()


@pytest.mark.parametrize("item", [{"examples_seen": 7, "best": None}, {"run": {}}, []])
def test_the_layout_of_a_version_without_manifests_is_damage(tmp_path, item):
    """It stored the evaluation in an item of its own."""
    with contextlib.closing(Checkpoints(tmp_path)) as first:
        first.save(1, small(1), {}, metrics(5.0))
    folder, said = tmp_path / "checkpoints" / "1", []
    (folder / "run" / "metadata").write_text(json.dumps(item))
    write_manifest(folder, 1)
    with contextlib.closing(Checkpoints(tmp_path, read_only=True, warn=said.append)) as again:
        other_network = {"c": jnp.zeros(1)}
        for read in (again.progress, lambda step: again.restore(step, other_network)):
            with pytest.raises(UnreadableCheckpoint, match=r"no progress and evaluation.*the version that wrote it$"):
                read(1)
        assert again.best_step() is None and "; its evaluation is not known" in said[0]


def test_a_step_saved_again_stays_readable_until_its_successor_is_complete(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {}, None)
    checkpoints.wait()
    monkeypatch.setattr(
        module.manifest, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    checkpoints.save(1, small(10), {}, metrics(3.0))
    with pytest.raises(UserError, match=r"checkpoint of step 1 cannot be written in .*: No space left on device"):
        checkpoints.wait()
    monkeypatch.undo()
    for again in (Checkpoints(tmp_path, read_only=True), Checkpoints(tmp_path)):  # as after a kill
        assert again.steps() == [1] and same(again.restore_latest(small(0))[1], small(1))
        again.close()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(10), {}, metrics(3.0))
    checkpoints.wait()
    assert same(checkpoints.restore_latest(small(0))[1], small(10)) and checkpoints.best_step() == 1
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", "newest_checkpoint.json"}
    checkpoints.close()


def test_a_full_disk_costs_no_complete_checkpoint(disk, capfd):
    checkpoints = Checkpoints(disk)
    checkpoints.save(1, small(1), {}, None)
    checkpoints.wait()
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(UserError) as caught:
        checkpoints.save(2, small(2), {}, None)
        checkpoints.wait()
    assert "the checkpoint of step 2 cannot be written" in str(caught.value)
    assert str(caught.value).count("No space left on device") == 1 and "\n" not in str(caught.value)
    checkpoints.close()
    (disk / "filler").unlink()
    checkpoints = Checkpoints(disk)
    assert checkpoints.restore_latest(small(0))[0] == 1
    checkpoints.save(2, small(2), {}, None)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert "Traceback" not in capfd.readouterr().err


def test_a_commit_that_fails_in_the_background_leaves_no_step_that_is_not_there(tmp_path, monkeypatch):
    """The caller may go on. Orbax counts a step as kept as soon as it has begun, and dropped whole ones for it."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, small(1), {}, metrics(9.0))
    checkpoints.wait()
    for step in (2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(
                module.manifest, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
            )
            checkpoints.save(step, small(step), {}, metrics(0.0))
            with pytest.raises(UserError, match=f"checkpoint of step {step} cannot be written"):
                checkpoints.wait()
        assert checkpoints.steps() == [1] and checkpoints.best_step() == 1
    checkpoints.save(2, small(20), {}, metrics(9.5))  # the same step, once there is room
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2] and same(checkpoints.restore_latest(small(0))[1], small(20))
    checkpoints.save(4, small(4), {}, metrics(9.7))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4] and checkpoints.best_step() == 1
    checkpoints.close()


def test_process_0_decides_whether_a_step_is_saved_again(tmp_path, monkeypatch):
    """It moves the folder while the others look: one that no longer finds it must come to the barrier all the same."""
    came, said = [], []
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(sharing, "agree", lambda own: bool(said.append(own)) or True)  # of process 0, whose is there
    monkeypatch.setattr(checkpoints, "_supersede", came.append)
    checkpoints.save(1, small(1), {}, None)
    checkpoints.close()
    assert said == [False] and came == [1]


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(state()) is None
    assert checkpoints.steps() == [] and checkpoints.best_step() is None
    checkpoints.close()


@pytest.mark.medium
def test_a_state_moves_between_numbers_of_devices(tmp_path):
    _, eight, _ = tiny.build(tiny.config(), tiny.mesh(8))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, eight, {}, None)
    _, restored, _ = checkpoints.restore_latest(state())
    assert same(restored, eight)
    assert jax.tree.leaves(restored.params)[0].sharding.device_set == {jax.devices()[0]}
    checkpoints.close()


def test_neither_a_signal_nor_a_step_that_training_removes_is_damage(tmp_path, monkeypatch):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {}, metrics(5.0))
        checkpoints.wait()
        monkeypatch.setattr(module.saved_state, "filled", lambda *a: (_ for _ in ()).throw(Interrupted("stopped", 143)))
        with pytest.raises(Interrupted):
            checkpoints.restore_latest(small(0))
        assert checkpoints.steps() == [1, 2] and not (tmp_path / "damaged").exists()
    with contextlib.closing(Checkpoints(tmp_path, read_only=True, warn=(said := []).append)) as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints" / "2")
        with pytest.raises(RemovedCheckpoint, match="2 cannot be read: training there has removed it; try again"):
            checkpoints.metrics(2)
        assert said == []


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    said = []
    with contextlib.closing(Checkpoints(tmp_path, keep=1, warn=said.append)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {}, None)
            finish = checkpoints._manager.wait_until_finished

            def refuse(finish=finish):
                finish()
                raise OSError(errno.ENOTEMPTY, "Directory not empty", "checkpoints/1")

            monkeypatch.setattr(checkpoints._manager, "wait_until_finished", refuse)
            checkpoints.wait()
        assert checkpoints.restore_latest(state())[0] == 3
    assert len(said) == 3 and said[0].startswith("warning: an old checkpoint cannot be deleted: [Errno")


def test_after_a_checkpoint_that_could_not_be_written_the_next_one_is_tried(tmp_path, monkeypatch):
    said, full, write = [], [1], module.manifest.write_manifest

    def fail_once(folder, step):
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, step)

    monkeypatch.setattr(module.manifest, "write_manifest", fail_once)
    with contextlib.closing(Checkpoints(tmp_path, warn=said.append)) as checkpoints:
        checkpoints.save(1, state(1), {}, None)
        checkpoints.save(2, state(2), {}, None)
        checkpoints.wait()
        assert checkpoints.steps() == [2] and checkpoints.restore_latest(state())[0] == 2
    assert len(said) == 1 and said[0].startswith("warning: the checkpoint of step 1 cannot be written in ")
    assert said[0].endswith("; step 2 is written now")


def test_after_two_checkpoints_that_could_not_be_written_the_run_ends(tmp_path, monkeypatch):
    def full(folder, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = []
    monkeypatch.setattr(module.manifest, "write_manifest", full)
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    checkpoints.save(1, state(1), {}, None)
    checkpoints.save(2, state(2), {}, None)
    with pytest.raises(UserError, match=r"^the checkpoint of step 2 cannot be written .*No space left on device"):
        checkpoints.save(3, state(3), {}, None)
    checkpoints.close()
    assert len(said) == 1


def test_with_several_processes_a_checkpoint_that_cannot_be_deleted_is_an_error(tmp_path, monkeypatch):
    """Only process 0 deletes: it could not go on alone."""
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(1, state(1), {}, None)
        finish = checkpoints._manager.wait_until_finished

        def refuse():
            finish()
            monkeypatch.setattr(module.jax, "process_count", lambda: 2)
            raise OSError(errno.ENOTEMPTY, "Directory not empty", "checkpoints/1")

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", refuse)
        with pytest.raises(UserError, match="Directory not empty"):
            checkpoints.wait()
        monkeypatch.undo()


def test_the_average_of_a_run_is_preferred(tmp_path):
    saved = dataclasses.asdict(state(2))
    variables = {"params": saved["params"], "batch_stats": saved["batch_stats"]}
    saved["ema"] = jax.tree.map(lambda x: x + 1, variables)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(5, saved, {}, None)
        checkpoints.wait()
        kind, average = checkpoints.restore_weights(5)
        assert kind == "ema" and same(average, saved["ema"])
