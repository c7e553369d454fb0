"""The time of a training step of each row."""

import json
import os

import pytest

from hga_flax.errors import UserError
from hga_flax.lab import results, step_times
from hga_flax.lab.runs import open_directory
from hga_flax.lab.study import load_study
from tests.commands import ROOT
from tests.lab.made_up import TINY, write_study


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_saved_report_cannot_be_timed(tmp_path):
    with pytest.raises(UserError, match="--time needs the study's folder"):
        step_times.measure({"directory": str(tmp_path / "gone"), "rows": []}, print)


def test_a_row_that_was_not_started_is_named_before_anything_is_compiled(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "row.json").write_text("{")
    with pytest.raises(UserError, match="--time needs every row, and 'b' has not been started"):
        step_times.measure({"directory": str(tmp_path), "rows": [{"row": "a"}, {"row": "b"}]}, print)


@pytest.mark.slow
def test_rows_are_timed_and_the_times_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(step_times, "ROUNDS", 3)
    cache = f"training.compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"
    rows = {"none": [], "wide": ["model.options=features=32"]}
    overrides = [*TINY, cache, "model.attention=none"]
    file = write_study(tmp_path, overrides=overrides, rows=rows, directory=str(tmp_path / "runs"))
    open_directory(load_study(file))
    loaded, said = results.load(file), []
    step_times.measure(loaded, said.append)
    times = [row["step_ms"] for row in loaded["rows"]]
    assert 0 < times[0] < times[1] and len(said) == 2
    kept = json.loads((tmp_path / "runs" / "made_up.step_times.json").read_text())
    assert kept["step_ms"] == {"none": times[0], "wide": times[1]} and kept["device"]
    assert [row["step_ms"] for row in results.load(file)["rows"]] == times
