"""What lies in a study's folder."""

import json
import pathlib

import pytest

from hga_flax.errors import UserError
from hga_flax.lab.runs import all_runs, command, last_evaluation, open_directory, read_json, write_text
from hga_flax.lab.study import load_study
from tests.commands import ROOT
from tests.lab.made_up import TINY, write_result, write_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_study(write_study(tmp_path), str(tmp_path / "runs"))


def test_runs_come_seed_by_seed(study):
    runs = all_runs(study)
    assert [run.name for run in runs[:4]] == ["none.seed_0", "se.seed_0", "hga.seed_0", "none.seed_1"]
    assert len(runs) == 9 and runs[4].config.seed == 1 and runs[4].config.model.attention == "se"
    assert runs[4].workdir == study.directory / "se" / "seed_1"
    assert runs[4].command.startswith("python train.py --config=configs/digits.py --config.model.name=cifar_resnet8 ")
    assert runs[4].command.endswith(f"--config.model.attention=se --config.seed=1 --workdir={runs[4].workdir}")


def test_a_run_is_over_with_a_result_or_a_failure(study):
    made, failed, missing = all_runs(study)[:3]
    write_result(made.workdir, 12.5)
    write_text(failed.workdir / "failure.json", json.dumps({"error": "it diverged"}))
    assert made.is_over and made.result()["top1_error"] == 12.5 and made.failure() is None
    assert failed.is_over and failed.result() is None and failed.failure() == "it diverged"
    assert not missing.is_over


def test_the_folder_says_what_the_study_is(study, tmp_path):
    claims = open_directory(study)
    assert claims == study.directory / "claims"
    described = json.loads((study.directory / "made_up.json").read_text())
    assert described["rows"]["hga"]["baseline"] == "none" and described["seeds"] == [0, 1, 2]
    assert open_directory(study) == claims  # another worker's turn
    assert not list(study.directory.rglob(".*"))
    changed = load_study(write_study(tmp_path, overrides=[*TINY, "optimizer.momentum=0.5"]), str(study.directory))
    with pytest.raises(UserError, match="started with another configuration"):
        open_directory(changed)


def test_the_last_evaluation_counts_not_the_best(tmp_path):
    lines = [{"step": 1, "train/loss": 1.0}, {"step": 5, "eval/top1_error": 3.0}, {"step": 9, "eval/top1_error": 4.0}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_evaluation(tmp_path) == {"step": 9, "top1_error": 4.0}
    file.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="no evaluation"):
        last_evaluation(tmp_path)


def test_files_that_cannot_be_read_or_written(tmp_path):
    file = tmp_path / "file"
    assert read_json(file) is None
    file.write_text("[1]")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(file)
    with pytest.raises(UserError, match="cannot be written"):
        write_text(file / "below", "")


def test_the_command_of_a_run_has_its_hardware():
    made = lambda *hardware, **more: command("c.py", [], 0, pathlib.Path("w"), *hardware, **more).split(" python ")[0]
    assert made(2, 3) == "JAX_NUM_CPU_DEVICES=3 NPROC=2"
    assert made(None, 2, gpu=True) == "CUDA_VISIBLE_DEVICES=0,1"
    assert made(None, 4).startswith("python train.py")
