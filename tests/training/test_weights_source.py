import shutil

import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.training import weights_source as w
from hga_flax.training.initial_weights import fit
from tests import torch_writer
from tests.commands import ROOT
from tests.training.test_initial_weights import SMALL, places, resnet, resnet_start, start


@pytest.mark.medium
def test_another_network_than_a_runs_is_told_with_the_flags_of_the_runs(run):
    here = places("cifar_resnet14", attention="hga", features=8)
    flags = r"--config\.model\.name=cifar_resnet8 --config\.model\.options=features=4 builds the network that"
    with pytest.raises(UserError, match=f"not the weights of ours: .*; {flags}"):
        fit(w.read_source(start(run), here), here, "ours")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere",
            r"nowhere: there is no such file or folder; name a run's folder \(DIR, DIR@latest, DIR@STEP\) or a ",
        ),
        ("nowhere@latest", "nowhere@latest: there is no such file or folder"),
        ("notes.txt", "a text file that starts with 'Dear', not weights"),
        ("empty", "is not a run's folder .*: it is an empty folder"),
        ("hub", r"is not a run's folder .*name a file in it: model\.safetensors"),
        (
            "weights.pth",
            "these are not the weights of cifar_resnet8: 0 of its 0 arrays have a matching name; the file has 10 "
            "tensors",
        ),
        ("damaged.pth", "cannot read weights"),
    ],
)
def test_what_holds_no_weights_is_one_line(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("Dear")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").write_text("")
    (tmp_path / "damaged.pth").write_text("")
    (tmp_path / "empty").mkdir()
    shutil.copy(ROOT / "tests/golden/torch/state_zip.pth", tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        w.read_source(start(tmp_path / name), {})
    if name != "weights.pth":  # which is a file of weights, and shows in the first second
        with pytest.raises(UserError, match=message):
            w.check_source(start(tmp_path / name), str(tmp_path / "run"))


@pytest.mark.medium
def test_a_run_that_goes_on_and_one_in_a_bucket_are_not_asked_for_their_source(tmp_path, run):
    for workdir in (str(run), "gs://bucket/run"):
        w.check_source(start(tmp_path / "nowhere"), workdir)
    w.check_source(start(""), None)
    with pytest.raises(UserError, match="there is no such"):
        w.check_source(start(tmp_path / "nowhere"), None)


@pytest.mark.parametrize("command", ["train", "dry_run"])
def test_what_is_no_file_of_weights_is_said_before_anything_is_built(command, tmp_path, monkeypatch):
    from hga_flax.bench import dry_run
    from hga_flax.training import trainer

    (tmp_path / "page.pth").write_text("<html>")
    module = trainer if command == "train" else dry_run
    monkeypatch.setattr(module, "create_experiment", lambda *a, **k: pytest.fail("an experiment was built"))
    with pytest.raises(UserError, match="a web page"):
        getattr(module, command)(start(tmp_path / "page.pth"), str(tmp_path / "run"))


def test_a_training_checkpoint_of_torchvision(tmp_path):
    """Its average is taken and said, and `FILE@model` takes the weights themselves."""
    there = places("resnet50", channels=3, **SMALL)
    average = resnet(there, "module.", 1.0) | {"n_averaged": np.array(3)}
    file = torch_writer.save({"model": resnet(there), "epoch": 1, "model_ema": average}, tmp_path / "model_9.pth")
    for given, shift, label in ((str(file), 1.0, "model_ema"), (f"{file}@model", 0.0, "model")):
        found = fit(w.read_source(resnet_start(given), there), there, "resnet50")
        expected = resnet(there, shift=shift)["bn1.weight"]
        np.testing.assert_array_equal(found.loaded["params", "stem_norm", "scale"], expected)
        assert not found.fresh and not found.unused
        assert w.read_source(resnet_start(given), there).weights == ("ema" if shift else "raw")
        assert found.origin == f"{given}, its {label}, read as torchvision's or timm's resnet50"
        taken = dict(found.rows()).get("taken", "")
        assert taken.startswith("model_ema (an average of the weights); as many fit under model: ") == (shift == 1.0)
        assert (f"taken: {taken}" in found.text()) == (shift == 1.0)
    with pytest.raises(UserError, match="nothing under 'x' fits; it has model "):
        w.read_source(resnet_start(f"{file}@x"), there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"net": {f"stages.{k}": v for k, v in d.items() if "conv1" in k}, "epoch": 1},
         r"not the weights of resnet50: 2 of its 27 arrays have a matching name; the file has net \(2 tensors\), "
         r"epoch; in net: stages\.\w+"),
        (lambda d: {"model": d | {"layer9.0.conv1.weight": d["conv1.weight"]}},
         r"layer9\.0\.conv1\.weight has no place in it; the file has model \(28 tensors\); in model: .*; set config"),
        (lambda d: d | {"bn1.weight": np.ones(2, np.int64)}, r"not real numbers, .*: stem_norm/scale \(int64\); "),
    ],
)  # fmt: skip
def test_a_file_of_another_network_shows_its_keys(change, message, tmp_path):
    there = places("resnet50", channels=3, **SMALL)
    file = torch_writer.save(change(resnet(there)), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        fit(w.read_source(resnet_start(file), there), there, "resnet50")


def test_a_checkpoint_that_is_not_there(run):
    with pytest.raises(UserError, match=r"init\.weights=.*@9: choose best, latest or one of the steps 3"):
        w.read_source(start(f"{run}@9"), {})
