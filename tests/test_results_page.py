"""RESULTS.md shows what the saved reports say, and names the command of each."""

import json
import re

from hga_flax.lab.study import load_study
from tests.commands import ROOT
from tests.results_page import PAGE, reports, updated


def test_the_tables_are_those_of_the_saved_reports():
    text = PAGE.read_text()
    assert len(reports(text)) >= 3
    assert updated(text) == text, "python -m tests.results_page writes them anew"


def test_every_table_has_its_command_and_its_picture(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = PAGE.read_text()
    for report in reports(text):
        told = json.loads(report.read_text())
        assert re.search(rf"python -m hga_flax study {re.escape(told['file'])}\s", text)
        assert f"]({report.with_suffix('.png').relative_to(ROOT)})" in text and report.with_suffix(".svg").exists()
        assert list(load_study(told["file"], check=False).rows) == [row["row"] for row in told["rows"]]


def test_every_number_is_of_a_run_of_its_study():
    for report in reports(PAGE.read_text()):
        told = json.loads(report.read_text())
        for row in told["rows"]:
            for run in row["runs"]:
                assert run["workdir"] == f"{told['directory']}/{row['row']}/seed_{run['seed']}"
                assert not run["workdir"].startswith("/") and f"--config={told['config']} " in run["command"]
