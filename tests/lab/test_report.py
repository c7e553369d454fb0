"""`python -m hga_flax report` as it is called."""

import json

import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError
from hga_flax.lab import report, results
from hga_flax.lab.runs import open_directory
from tests.lab.test_results import made  # noqa: F401


def test_it_prints_and_saves(made, tmp_path, capsys):  # noqa: F811
    file, _ = made
    assert main(["report", file, "--save", str(tmp_path / "out")]) is None
    printed = capsys.readouterr().out
    assert "study made_up" in printed and "not told apart" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"made_up.{suffix}" for suffix in ("md", "csv", "json", "png", "svg")
    }
    main(["report", str(tmp_path / "out" / "made_up.json")])
    assert capsys.readouterr().out == printed


def test_formats_and_runs(made, capsys):  # noqa: F811
    file, study = made
    main(["report", file, "--format=json", "--metric=loss", "--baseline=se"])
    told = json.loads(capsys.readouterr().out)
    assert told["metric"] == "loss" and told["rows"][0]["baseline"] == "se"
    main(["report", file, "--runs"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and str(study.directory / "hga" / "seed_2") in lines[-1]


def test_the_choices_are_those_of_the_parts():
    from hga_flax.lab import tables

    assert report.FORMATS == tables.FORMATS and tuple(results.METRICS) == report.METRICS


def test_bad_arguments_are_one_line(made, tmp_path):  # noqa: F811
    file, study = made
    for arguments, message in (
        (["report", file, "--baseline=x"], "no such row"),
        (["report", str(tmp_path / "none.py")], "no such file"),
        (["report", file, "--format=xml"], "invalid choice"),
        (["report", file, "--format=csv", "--runs"], "--format=csv: not with --runs"),
        (["report", str(tmp_path / "saved.json"), "--dir=x"], "--dir=x: only for a study file"),
        (["report", str(study.directory), "--scale=x"], "--scale=x: only for a study file"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
    open_directory(study)  # writes made_up.json, the study's record
    with pytest.raises(UserError, match=r"this folder holds the study's runs; choose another, such as .*/report"):
        main(["report", file, "--save", str(study.directory)])
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        main(["report", file, "--save", str(tmp_path / "there")])
