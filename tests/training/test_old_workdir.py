"""A workdir of version 0.1 as it was at commit dea73eb must be readable for ever: 60 steps on digits, two checkpoints.

cifar_resnet8 with features=4 and HGA, SGD with momentum, training.ema_decay=0.9. What it evaluated to then is below.
"""

import pathlib
import tarfile

import jax
import numpy as np
import pytest

from hga_flax.data.streams import CIPHER
from hga_flax.inference.predictor import Predictor
from hga_flax.runs import workdir as files
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.training.restore import evaluate_workdir, restore_workdir
from hga_flax.training.trainer import train
from tests.training import tiny

# (checkpoint, weights): (step, loss, top-1 error) on the 297 held-out digits.
THEN = {
    ("best", "ema"): (60, 1.6707987672953493, 52.18855218855219),
    ("latest", "raw"): (60, 1.5192566945496633, 45.45454545454545),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(pathlib.Path(__file__).with_name("old_workdir.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "old_workdir"


@pytest.mark.parametrize(("checkpoint", "weights"), THEN)
def test_it_evaluates_to_the_same_digits(old, checkpoint, weights):
    step, loss, top1_error = THEN[checkpoint, weights]
    result = evaluate_workdir(str(old), checkpoint, weights=weights)
    assert (result["step"], result["num_examples"]) == (step, 297)
    assert result["top1_error"] == top1_error and result["loss"] == pytest.approx(loss, rel=1e-5)


def test_it_predicts(old):
    images, labels = tiny.held_out_digits()
    rows = Predictor.from_workdir(str(old)).predict(images[:64])
    wrong = (rows.argmax(axis=1) != labels[:64]).mean()
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, rtol=1e-5)
    assert wrong < 0.75  # of the whole split 0.52; by chance 0.9


@pytest.mark.medium
def test_it_goes_on(old, capsys):
    """With its momentum and its average; with other keys of the optimizer, too, on which the state's shape depended."""
    before = restore_workdir(str(old), "latest").state
    assert restore_workdir(str(old), "31").step == 31
    assert any(np.any(leaf) for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim)
    config = files.read_config(old)
    with config.unlocked():
        config.training.steps = 62
        config.optimizer.decay_norm_and_bias = not config.optimizer.decay_norm_and_bias
    train(config, str(old))
    assert f"resuming {old} at step 60; changed: " in capsys.readouterr().out
    after = restore_workdir(str(old), "latest")
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), after.state.ema, before.ema)
    assert Checkpoints(old, read_only=True).progress(62).shuffled == CIPHER  # it keeps the order that it began with
    assert after.step == 62 and 0 < max(jax.tree.leaves(moved)) < 0.1
