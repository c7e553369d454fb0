import errno
import io
import itertools
import json
import os
import pathlib
import shlex
import signal
import socket
import types

import jax
import numpy as np
import pytest
from tensorboardX import record_writer

from hga_flax.data.pipeline import Dataset
from hga_flax.data.streams import PERMUTATION
from hga_flax.errors import Interrupted, UserError
from hga_flax.runs import checkpoints as checkpoints_module
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.clock import TIMINGS
from hga_flax.runs.progress import Progress
from hga_flax.training import trainer
from hga_flax.training.restore import evaluate_workdir, restore_workdir
from hga_flax.training.trainer import Loop, train
from tests.training import tiny


def rows(workdir, group):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if any(key.startswith(group) for key in row)]


@pytest.mark.medium
def test_a_run_leaves_everything_that_the_readme_names(tmp_path, capsys):
    assert train(tiny.config(), str(tmp_path)) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        ".trained_by.0", "checkpoints", "config.json", "dataset.json", "metrics.jsonl", "newest_checkpoint.json",
        "parameters.txt", "tensorboard",
    }  # fmt: skip
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6]
    assert [row["step"] for row in rows(tmp_path, "eval")] == [3, 6]
    assert all(row["eval/num_examples"] == 48 for row in rows(tmp_path, "eval"))
    assert {"train/loss", "train/top1_error", "train/top5_error", "train/learning_rate", "train/bad_images", "step",
            *TIMINGS} == set(rows(tmp_path, "train")[0])  # fmt: skip
    out = capsys.readouterr().out
    assert "started in " in out and "data and network" in out and "first step, " in out
    assert "imports" not in out  # nor whatever else this process did before
    progress = Checkpoints(tmp_path, read_only=True).progress(6)
    assert progress.shuffled == PERMUTATION and {"split", "image_size", "crop_fraction"} <= progress.best.keys()
    assert "finished" in out and f"tensorboard --logdir={tmp_path}" in out and "best so far" in out
    assert "stem_conv/kernel" in (tmp_path / "parameters.txt").read_text()


def test_a_signal_after_the_last_step_is_told_to_the_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(Loop, "summary", lambda loop: signal.raise_signal(signal.SIGTERM))
    assert train(tiny.config(training__steps=1), str(tmp_path)) == signal.SIGTERM
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(ours, expected):
    """The last state, bit for bit, what was logged, and the best evaluation."""
    states = [restore_workdir(str(workdir), "latest").state for workdir in (ours, expected)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)
    assert logged(ours) == logged(expected)
    bests = [Checkpoints(workdir, read_only=True).best_step() for workdir in (ours, expected)]
    assert bests[0] == bests[1]


def when(monkeypatch, place, number, action):
    """Does it before the `number`th batch (from 0) of a session's training or evaluations, or while it saves."""
    if place == "checkpoint":
        write, save = checkpoints_module.manifest.write_manifest, Checkpoints.save
        monkeypatch.setattr(checkpoints_module.manifest, "write_manifest", lambda *where: (action(), write(*where)))
        monkeypatch.setattr(Checkpoints, "save", lambda self, *what: (save(self, *what), self.wait()))
        return
    original, count = getattr(Dataset, f"{place}_batches"), itertools.count()

    def broken(self, *arguments):
        for batch in original(self, *arguments):
            if next(count) == number:
                action()
            yield batch

    monkeypatch.setattr(Dataset, f"{place}_batches", broken)


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    c = tiny.config(checkpoint__every_steps=1, training__steps=8)
    train(c, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        when(patch, "train", 6, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(c, str(tmp_path / "cut"))
    train(c, str(tmp_path / "cut"))
    assert "resuming" in capsys.readouterr().out
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert len(rows(tmp_path / "cut", "train")) == 4


MODERN = {
    "model__attention": "none",
    "model__options": "features=4, stochastic_depth=0.2",
    "training__ema_decay": 0.9,
    "training__accumulation_steps": 2,
    "optimizer__name": "adamw",
    "optimizer__learning_rate": 0.01,
    "data__randaugment_ops": 2,
    "evaluation__image_size": 12,
}


@pytest.mark.slow
def test_a_modern_run_goes_on_as_if_nothing_had_happened_and_is_evaluated_by_its_average(tmp_path, monkeypatch, capsys):
    c = tiny.config(checkpoint__every_steps=1, training__steps=8, **MODERN)
    train(c, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        when(patch, "train", 5, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(c, str(tmp_path / "cut"))
    train(c, str(tmp_path / "cut"))
    assert "resuming" in capsys.readouterr().out
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    last = rows(tmp_path / "cut", "eval")[-1]
    assert last["eval/ema_decay"] == 0.9 and last["step"] == 8
    results = {weights: evaluate_workdir(str(tmp_path / "cut"), "latest", weights=weights) for weights in (None, "raw")}
    assert results[None]["loss"] == pytest.approx(last["eval/loss"], rel=1e-6) and results[None]["weights"] == "ema"
    assert results["raw"]["weights"] == "raw" and results["raw"]["loss"] != results[None]["loss"]
    restored = restore_workdir(str(tmp_path / "cut"), "8")
    assert restored.variables is restored.state.ema and restored.experiment.eval_image_shape == (12, 12, 1)
    saved = Checkpoints(tmp_path / "cut", read_only=True).metrics(8)
    assert saved["loss"] == last["eval/loss"]  # by which the best is chosen


@pytest.mark.slow
def test_a_run_stopped_by_signals_everywhere_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    c = tiny.config(training__steps=10, training__log_every_steps=4, optimizer__clip_norm=1.0)
    train(c, str(tmp_path / "whole"))
    for place, number, saved in [
        ("train", 2, 2),  # in a window of logging
        ("checkpoint", 0, 4),  # that of step 3; in step 4, which logs
        ("train", 2, 6),  # in a step after which an evaluation is due
        ("eval", 1, None),  # in that evaluation, when the run goes on: nothing new yet
        ("eval", 4, 9),  # in the evaluation of step 9, after that of step 6
        ("eval", 4, 10),  # in the last one
    ]:
        with monkeypatch.context() as patch:
            when(patch, place, number, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted) as stopped:
                train(c, str(tmp_path / "cut"))
        assert stopped.value.code == 143
        assert (f"after step {saved}, which is saved" if saved else "nothing new to save") in str(stopped.value)
        assert saved is None or Checkpoints(tmp_path / "cut", read_only=True).steps()[-1] == saved
    train(c, str(tmp_path / "cut"))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "cut", "eval")] == [3, 6, 9, 10]
    assert all(row["train/gradient_norm"] > 0 for row in rows(tmp_path / "cut", "train"))
    assert not (tmp_path / "cut" / "superseded").exists()


def poison(monkeypatch, step):
    """Makes the labels of one step, wherever a session begins, those of no class: the loss is NaN."""
    original = Dataset.train_batches

    def poisoned(self, source, batch_size, shard, start=0, *more):
        batches = original(self, source, batch_size, shard, start, *more)
        for number, batch in enumerate(batches, start // batch_size + 1):
            yield batch | ({"label": np.full_like(batch["label"], 99)} if number == step else {})

    monkeypatch.setattr(Dataset, "train_batches", poisoned)


@pytest.mark.medium
def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, 6)
    c = tiny.config(training__steps=8, checkpoint__every_steps=2, training__log_every_steps=1)
    with pytest.raises(UserError, match=r"the loss of step 6 is nan; the checkpoint of step 4 is kept") as caught:
        train(c, str(tmp_path))
    assert "from step 4: JAX_DEBUG_NANS=1 " in str(caught.value) and "\n" not in str(caught.value)
    assert Checkpoints(tmp_path, read_only=True).steps() == [2, 3, 4]
    assert "train/images_per_second" not in rows(tmp_path, "train")[0]  # the first step only compiled


@pytest.mark.slow
def test_skipped_steps_are_logged_and_counted_over_sessions(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 6)
    options = {"training__log_every_steps": 1, "training__skip_nonfinite": 1}
    train(tiny.config(training__steps=8, **options), str(tmp_path))
    assert "step is skipped (1 of at most 1)" in capsys.readouterr().out
    state = restore_workdir(str(tmp_path), "latest").state
    assert (int(state.step), int(state.skipped)) == (8, 1)
    assert [row["train/skipped_steps"] for row in rows(tmp_path, "train")] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert rows(tmp_path, "train")[5]["train/loss"] is None  # nothing was learnt in that window
    poison(monkeypatch, 10)
    with pytest.raises(UserError, match=r"the loss of step 10 is nan \(the limit training\.skip_nonfinite=1 is"):
        train(tiny.config(training__steps=12, **options), str(tmp_path))
    train(tiny.config(training__steps=12, **(options | {"training__skip_nonfinite": 2})), str(tmp_path))
    assert rows(tmp_path, "train")[-1]["train/skipped_steps"] == 2


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    """The first step's loss and gradient are sound; the parameters that it leaves are not."""
    factors = {"optimizer__learning_rate": 1e20, "optimizer__learning_rate_factors": ("classifier=1e30",)}
    c = tiny.config(**factors, checkpoint__every_steps=1)
    with pytest.raises(UserError, match="diverged: parameters, statistics or momentum are not finite after step 1; no"):
        train(c, str(tmp_path))
    assert Checkpoints(tmp_path, read_only=True).steps() == []


@pytest.mark.slow
def test_the_command_of_a_diverged_run_finds_where_it_begins(tmp_path):
    jax.config.update("jax_debug_nans", True)
    try:
        with pytest.raises(FloatingPointError, match=r"[Ii]nvalid value \(nan\)") as caught:
            train(tiny.config(optimizer__learning_rate=1e30, training__steps=20), str(tmp_path))
        assert any(entry.path.parent.name == "models" for entry in caught.traceback)  # the layer is named
    finally:
        jax.config.update("jax_debug_nans", False)


SLOW_SITES = ("config.json", "parameters.txt", "events.out", "checkpoints")
SITES = ("metrics.jsonl", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SITES))


def fill_disk(monkeypatch, site):
    """Every write to a file whose path holds `site` finds the disk full, from now on."""
    original, text = pathlib.Path.open, pathlib.Path.write_text

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opening(self, mode="r", *arguments, **options):
        return Full() if site in str(self) and set(mode) & set("wa") else original(self, mode, *arguments, **options)

    def writing(self, *arguments, **options):
        if site in str(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return text(self, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", opening)
    monkeypatch.setattr(pathlib.Path, "write_text", writing)
    monkeypatch.setattr(record_writer, "open_file", lambda path: opening(pathlib.Path(path), "wb"))


@pytest.mark.medium
@pytest.mark.parametrize("site", SITES)
def test_a_disk_that_is_full_at_any_write_costs_no_completed_step(tmp_path, monkeypatch, site, capfd):
    train(tiny.config(training__steps=3), str(tmp_path))
    (tmp_path / "parameters.txt").unlink()  # else it would not be written again
    with monkeypatch.context() as patch:
        fill_disk(patch, site)
        with pytest.raises(UserError, match=r"cannot be written.*No space left on device") as caught:
            train(tiny.config(), str(tmp_path))
    assert "\n" not in str(caught.value) and "Traceback" not in capfd.readouterr().err
    assert Checkpoints(tmp_path, read_only=True).steps() == [3]
    train(tiny.config(), str(tmp_path))  # with room again, it goes on
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 3, 4, 6]
    assert restore_workdir(str(tmp_path), "latest").step == 6


@pytest.mark.medium
def test_a_disk_that_is_full_at_the_first_start(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, "dataset.json")  # which is written once
        with pytest.raises(UserError, match=r"dataset\.json cannot be written.*No space left on device"):
            train(plain(training__steps=2), str(tmp_path))
    train(plain(training__steps=2), str(tmp_path))
    assert restore_workdir(str(tmp_path), "latest").step == 2


@pytest.mark.medium
def test_a_longer_plan_continues_and_says_what_changed(tmp_path, capsys):
    train(tiny.config(), str(tmp_path))
    train(tiny.config(training__steps=8), str(tmp_path))
    out = capsys.readouterr().out
    assert "resuming" in out and "changed: training.steps: 6 -> 8" in out
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6, 8]


def plain(**overrides):
    """What compiles in the least time."""
    return tiny.config(model__attention="none", **overrides)


@pytest.mark.medium
def test_a_plan_that_ends_before_the_last_step_says_so(tmp_path, capsys):
    train(plain(training__steps=3), str(tmp_path))
    train(plain(training__steps=2), str(tmp_path))
    out = " ".join(capsys.readouterr().out.split())
    assert f"nothing to train: {tmp_path} holds step 3, but the plan now ends at step 2; the training so far is" in out
    assert "3 of 2" not in out and Checkpoints(tmp_path, read_only=True).steps() == [3]


def test_a_second_training_in_a_workdir_is_refused_and_leaves_it_alone(tmp_path, monkeypatch):
    refused = []

    def second(loop, *arguments):  # while the first is about to take its first step
        with pytest.raises(UserError) as caught:
            train(plain(training__steps=9), str(tmp_path))
        refused.append(str(caught.value))
        return original(loop, *arguments)

    original = Loop.run
    monkeypatch.setattr(Loop, "run", second)
    train(plain(training__steps=1), str(tmp_path))
    assert refused == [
        f"--workdir={tmp_path}: another command trains there: process {os.getpid()} on {socket.gethostname()}; wait "
        "for its end, or choose another --workdir"
    ]
    assert json.loads((tmp_path / "config.json").read_text())["training"]["steps"] == 1
    assert [row["step"] for row in logged(tmp_path)] == [1, 1]  # a line of training and one of the evaluation


@pytest.mark.medium
def test_a_validation_split_without_a_readable_image_books_no_result(tmp_path, monkeypatch, capsys):
    whole = Dataset.eval_batches

    def unreadable(self, *arguments):
        for batch in whole(self, *arguments):
            yield batch | {"mask": np.zeros_like(batch["mask"])}

    c = plain(training__steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "eval_batches", unreadable)
        train(c, str(tmp_path))
        out = capsys.readouterr().out
        line = "none of the images of the split 'test' can be read; repair them, or choose another split"
        assert f"warning: step 3 is not evaluated: {line}" in " ".join(out.split()) and "nan" not in out
        assert rows(tmp_path, "eval") == [] and Checkpoints(tmp_path, read_only=True).best_step() is None
        with pytest.raises(UserError, match=f"^{line}$"):
            evaluate_workdir(str(tmp_path), "latest")
        train(c, str(tmp_path))  # the next start works
    with c.unlocked():
        c.training.steps = 6
    train(c, str(tmp_path))
    assert "(best so far)" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path, "eval")] == [6]


def test_an_evaluation_of_nothing_that_an_older_version_booked_is_forgotten(tmp_path):
    nothing = {"loss": None, "top1_error": None, "top5_error": None}
    assert Progress.restored({"best": {"step": 3} | nothing}).best is None
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"params": np.zeros(3)}, {}, nothing)
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).metrics(3) is None


@pytest.mark.slow
def test_auxiliary_heads_are_trained(short_googlenet, monkeypatch):
    from hga_flax.models import googlenet
    from hga_flax.processes.mesh import to_devices

    monkeypatch.setattr(googlenet, "AUXILIARY_AFTER", {"3b": "auxiliary1", "4e": "auxiliary2"})
    c = tiny.config(model__name="googlenet", model__options="aux_logits=True", model__attention="none")
    _, state, step = tiny.build(c, tiny.mesh(2), (32, 32, 3))
    before = jax.tree.map(np.asarray, state.params)
    after, _ = step(state, next(to_devices(iter([tiny.batch(4, 32, 3)]), tiny.mesh(2))))
    heads = [name for name in before if name.startswith("auxiliary")]
    assert len(heads) == 2
    for name in heads:
        changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[name], after.params[name])
        assert min(jax.tree.leaves(changes)) > 1e-6  # more than weight decay does


def test_the_printed_commands_work_with_blanks_in_the_path_and_few_classes_have_no_top_5(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hga_flax.config.command_line._imported", ["my_attention"])
    loop = trainer.Loop.__new__(trainer.Loop)
    loop._workdir, loop._progress, loop._console = tmp_path / "a run", Progress(), trainer.Console(goes_on=True)
    metrics = {"top1_error": 12.5, "loss": 1.0}
    loop._checkpoints = types.SimpleNamespace(steps=lambda: [4], metrics=lambda step: metrics)
    loop.summary()
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[1:]}
    folder = str(tmp_path / "a run")
    assert shlex.split(lines["evaluate"]) == ["python", "evaluate.py", f"--workdir={folder}", "--import=my_attention"]
    assert shlex.split(lines["curves"]) == ["tensorboard", f"--logdir={folder}"]
    assert lines["last"] == "top-1 error 12.50 % (step 4)"
    metrics["top5_error"] = 2.5
    loop.summary()
    assert "top-1 error 12.50 %, top-5 2.50 % (step 4)" in capsys.readouterr().out
