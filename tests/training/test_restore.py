import argparse
import json
import logging
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

import evaluate
import predict
from hga_flax.config.keys import ALWAYS, KEYS
from hga_flax.errors import UserError
from hga_flax.inference import export as export
from hga_flax.inference.predictor import Predictor
from hga_flax.pictures import views
from hga_flax.processes.settings import DETERMINISTIC_FLAGS
from hga_flax.training import restore as module
from hga_flax.training.restore import evaluate_restored, evaluate_workdir, restore_workdir


@pytest.fixture(scope="module")
def workdir(short_run, tmp_path_factory):
    return pathlib.Path(shutil.copytree(short_run, tmp_path_factory.mktemp("run"), dirs_exist_ok=True))


@pytest.mark.medium
def test_each_kind_of_checkpoint(workdir):
    assert restore_workdir(str(workdir), "latest").step == 6
    assert restore_workdir(str(workdir), "3").step == 3
    assert restore_workdir(str(workdir)).step in (3, 6)


def test_evaluation_writes_nothing(workdir):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    result = evaluate_workdir(str(workdir), "latest", batch_size=5)
    assert result["num_examples"] == 48 and result["split"] == "test"
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_another_split_and_data_directory(workdir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    config = (copy / "config.json").read_text().replace('"fake": true', '"fake": false')
    (copy / "config.json").write_text(config)
    result = evaluate_workdir(str(copy), "latest", split="train[:20%]", data_dir=str(tmp_path / "data"))
    assert result["num_examples"] == 300 and np.isfinite(result["loss"])
    assert (tmp_path / "data" / "digits").is_dir()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("state/_METADATA", "state/_METADATA is missing; trying the next best"),
        ("run/metadata", "run/metadata is missing; its evaluation is not known"),
    ],
)
def test_in_place_of_a_damaged_best_checkpoint_the_next_best_is_evaluated_aloud(
    workdir, tmp_path, capsys, damaged, message
):
    shutil.copytree(workdir, tmp_path / "copy")
    copy, best = tmp_path / "copy", restore_workdir(str(workdir)).step
    (copy / "checkpoints" / str(best) / damaged).unlink()
    result, other = evaluate_workdir(str(copy)), {3: 6, 6: 3}[best]
    assert result == evaluate_workdir(str(workdir), str(other)) and result["step"] == other
    error = capsys.readouterr().err
    assert error == f"warning: checkpoint {copy}/checkpoints/{best} cannot be read: {message}\n"
    with pytest.raises(UserError, match=rf"checkpoint .*/{best} cannot be read: {damaged} is missing"):
        evaluate_workdir(str(copy), str(best))  # who names one gets that one
    (copy / "checkpoints" / str(other) / "state" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"none of the [12] evaluated checkpoints in .*/checkpoints can be read"):
        evaluate_workdir(str(copy))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [("9", "one of the steps 3, 6"), ("-1", "one of the steps 3, 6"), ("last", "one of the steps 3, 6")],
)
def test_a_checkpoint_that_is_not_there(workdir, checkpoint, message):
    with pytest.raises(UserError, match=message):
        restore_workdir(str(workdir), checkpoint)


def test_a_step_may_be_a_number_and_the_program_may_have_set_a_mesh_of_its_own(workdir):
    restored = restore_workdir(workdir, 3)
    assert restored.step == 3
    expected = evaluate_restored(restored)
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("model",))):
        assert evaluate_restored(restore_workdir(workdir, 3)) == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"momentum": 0.9,', "", r"config\.json cannot be used: optimizer\.momentum is missing"),
        ('"seed": 0', '"seed": true', r"config\.json cannot be used: seed=True: must be a whole number"),
        ('"data": {', '"date": {', r"config\.json cannot be used: date\.\w+: there is no such key"),
        (
            '"options": "features=4"',
            "\"options\": \"features=__import__('os').mkdir('/tmp/never')\"",
            "write keyword arguments",
        ),
    ],
)
def test_a_configuration_that_was_meddled_with_is_one_line(workdir, tmp_path, old, new, message):
    text = (workdir / "config.json").read_text()
    assert old in text
    (tmp_path / "config.json").write_text(text.replace(old, new))
    shutil.copy(workdir / "dataset.json", tmp_path)
    with pytest.raises(UserError, match=message):
        restore_workdir(str(tmp_path))


def test_a_workdir_without_checkpoints(workdir, tmp_path):
    for name in ("config.json", "dataset.json"):
        shutil.copy(workdir / name, tmp_path / name)
    for make in (lambda: None, (tmp_path / "checkpoints").mkdir):
        make()
        for checkpoint in ("best", "latest", "1"):
            with pytest.raises(UserError, match="no checkpoint here yet"):
                restore_workdir(str(tmp_path), checkpoint)


def test_the_weights_of_a_run_without_an_average(workdir):
    restored = restore_workdir(str(workdir), "latest")
    assert restored.weights == "raw" and restored.variables["params"] is restored.state.params
    with pytest.raises(UserError, match=r"^weights=ema: this run keeps no average \(training\.ema_decay=0\)"):
        restore_workdir(str(workdir), "latest", weights="ema")
    with pytest.raises(UserError, match=r"^weights=Raw: must be ema, raw or None$"):
        restore_workdir(str(workdir), "latest", weights="Raw")


def test_a_workdir_of_before_a_key_still_evaluates(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    for key in [key for key, entry in KEYS.items() if entry.before is not ALWAYS]:
        group, name = key.split(".")
        del config[group][name]
    file.write_text(json.dumps(config))
    assert evaluate_workdir(str(tmp_path / "old"), "latest") == evaluate_workdir(str(workdir), "latest")


def settings():
    names = ("absl", "asyncio", "gcsfs", "s3fs")
    return (
        [logging.getLogger(name).getEffectiveLevel() for name in names],
        jax.config.jax_compilation_cache_dir,
        dict(os.environ),
    )


def test_the_library_leaves_the_settings_of_the_process_to_its_caller(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    cache, level = jax.config.jax_compilation_cache_dir, logging.getLogger("absl").level
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        logging.getLogger("absl").setLevel(logging.INFO)
        before = settings()
        restored = restore_workdir(str(workdir), "latest")
        assert settings() == before
        Predictor(restored)
        assert settings() == before
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        logging.getLogger("absl").setLevel(level)


class Touched(Exception):
    """JAX is asked for its devices."""


COMMANDS = {
    "evaluate": lambda workdir: evaluate.main,
    "predict": lambda workdir: predict.main,
    "export": lambda workdir: lambda: export.run(argparse.Namespace(
        format="stablehlo", workdir=workdir, out=f"{workdir}.bin", checkpoint="best", data_dir=None,
        weights=None, overrides=[],
    )),
    "explain": lambda workdir: lambda: views.explain(workdir, "best", [], None),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_ask_for_determinism_before_they_touch_a_device(workdir, monkeypatch, name):
    """On a GPU the flag counts when the first device is touched, and never again."""
    flags = []

    def touch():
        flags.append(os.environ["XLA_FLAGS"])
        raise Touched

    monkeypatch.setattr(module, "create_mesh", touch)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(sys, "argv", [name, f"--workdir={workdir}", *(["x.png"] if name == "predict" else [])])
    with pytest.raises(Touched):
        COMMANDS[name](str(workdir))()
    assert flags == [" ".join(DETERMINISTIC_FLAGS)]
