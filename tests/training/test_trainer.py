import itertools
import json

import jax
import numpy as np
import pytest

from hga_flax.data.pipeline import Dataset
from hga_flax.errors import UserError
from hga_flax.training.restore import restore_workdir
from hga_flax.training.trainer import train
from tests.training import tiny


def rows(workdir, group):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if any(key.startswith(group) for key in row)]


def test_a_run_leaves_everything_that_the_readme_names(tmp_path, capsys):
    train(tiny.config(), str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "dataset.json", "metrics.jsonl", "newest_checkpoint.json", "parameters.txt",
        "tensorboard",
    }  # fmt: skip
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6]
    assert [row["step"] for row in rows(tmp_path, "eval")] == [3, 6]
    assert all(row["eval/num_examples"] == 48 for row in rows(tmp_path, "eval"))
    assert {"train/loss", "train/top1_error", "train/top5_error", "train/learning_rate", "train/images_per_second",
            "train/data_wait_share", "train/bad_images", "step"} == set(rows(tmp_path, "train")[0])  # fmt: skip
    out = capsys.readouterr().out
    assert "finished" in out and f"tensorboard --logdir={tmp_path}" in out and "best so far" in out
    assert "stem_conv/kernel" in (tmp_path / "parameters.txt").read_text()


def interrupt_after(monkeypatch, batches):
    original = Dataset.train_batches

    def broken(self, *arguments):
        yield from itertools.islice(original(self, *arguments), batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(Dataset, "train_batches", broken)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    c = tiny.config(checkpoint__every_steps=1, training__steps=8)
    train(c, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train(c, str(tmp_path / "cut"))
    train(c, str(tmp_path / "cut"))
    assert "resuming" in capsys.readouterr().out
    states = [restore_workdir(str(tmp_path / name), "latest").state for name in ("whole", "cut")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [[row["train/loss"] for row in rows(tmp_path / name, "train")] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_longer_plan_continues_and_says_what_changed(tmp_path, capsys):
    train(tiny.config(), str(tmp_path))
    train(tiny.config(training__steps=8), str(tmp_path))
    out = capsys.readouterr().out
    assert "resuming" in out and "changed: training.steps: 6 -> 8" in out
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6, 8]


def test_a_data_set_that_changed_is_refused(tmp_path):
    train(tiny.config(), str(tmp_path))
    with pytest.raises(UserError, match="the training split has 64 examples, but this run began with 48"):
        train(tiny.config(training__steps=8, data__fake_examples=64), str(tmp_path))


@pytest.mark.slow
def test_auxiliary_heads_are_trained(tmp_path):
    from hga_flax.training.mesh import to_devices

    c = tiny.config(model__name="googlenet", model__options="aux_logits=True", model__attention="none")
    _, state, step = tiny.build(c, tiny.mesh(2), (32, 32, 3))
    before = jax.tree.map(np.asarray, state.params)
    after, _ = step(state, next(to_devices(iter([tiny.batch(4, 32, 3)]), tiny.mesh(2))))
    heads = [name for name in before if name.startswith("auxiliary")]
    assert heads
    for name in heads:
        changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[name], after.params[name])
        assert min(jax.tree.leaves(changes)) > 1e-6  # more than weight decay does
