"""The time of a training step of each row."""

import json
import os

import pytest

from hga_flax.errors import UserError
from hga_flax.lab import results, step_times
from hga_flax.lab.runs import open_directory
from hga_flax.lab.study import load_study
from tests import commands
from tests.commands import ROOT
from tests.lab.made_up import TINY, write_study


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_saved_report_cannot_be_timed(tmp_path):
    with pytest.raises(UserError, match="a saved report has no runs; name the study's file or its folder"):
        results.locate(str(tmp_path / "report.json"))


def test_a_row_that_was_not_started_is_named_before_anything_is_compiled(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "row.json").write_text("{")
    with pytest.raises(UserError, match="--time needs every row, and 'b' has not been started"):
        step_times.measure("study", {"rows": {"a": {}, "b": {}}}, tmp_path, print)


@pytest.mark.medium
def test_a_module_that_has_used_jax_is_said(tmp_path, monkeypatch):
    (tmp_path / "uses_jax.py").write_text("import jax\n\nTABLE = jax.numpy.arange(4)\n")
    file = write_study(tmp_path, overrides=TINY, rows={"none": []}, baseline="none", directory=str(tmp_path / "runs"))
    open_directory(load_study(file))
    (tmp_path / "runs" / "hardware.json").write_text(json.dumps({"platform": "cpu"}))  # of a damaged or edited folder
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ("-m", "hga_flax", "report", file, "--time", "--import=uses_jax")
    result = commands.run(*arguments, devices=0)
    assert result.returncode == 1
    assert result.stderr.startswith("error: the number of CPU devices cannot be set, because a module has used JAX")


@pytest.mark.slow
def test_rows_are_timed_on_the_hardware_of_the_runs_and_the_times_kept(tmp_path):
    cache = f"training.compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"
    rows = {"none": [], "wide": ["model.options=features=32"]}
    overrides = [*TINY, cache, "model.attention=none"]
    file = write_study(tmp_path, overrides=overrides, rows=rows, directory=str(tmp_path / "runs"))
    open_directory(load_study(file))
    (tmp_path / "runs" / "hardware.json").write_text(json.dumps({"platform": "cpu", "devices": 1, "threads": 1}))
    result = commands.run("-m", "hga_flax", "report", file, "--time", devices=0)
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "runs" / "made_up.step_times.json").read_text())
    assert 0 < kept["step_ms"]["none"] < kept["step_ms"]["wide"]
    assert (kept["device"], kept["devices"], kept["threads"]) == ("1 CPU thread", 1, 1)  # not this machine's cores
    assert "Steps timed on: 1 CPU thread." in result.stdout.splitlines()
    assert {row["row"]: row["step_ms"] for row in results.load(file)["rows"]} == kept["step_ms"]
