"""What a report gathers, from a file, a folder or a saved report; made-up results with known means."""

import dataclasses
import json
import pathlib
import re

import pytest
from scipy import stats

from hga_flax.config import command_line
from hga_flax.config.loading import to_json
from hga_flax.data.sources import DatasetInfo
from hga_flax.errors import UserError
from hga_flax.lab import results, tables
from hga_flax.lab.runs import open_directory, write_text
from hga_flax.lab.study import fingerprint, load_study
from hga_flax.pictures.costs import draw_costs
from hga_flax.runs.workdir import write_dataset
from tests.commands import ROOT
from tests.lab.made_up import ROWS, write_result, write_study

NONE, SE, HGA = (20.0, 21.0, 22.0), (19.0, 20.5, 20.0), (19.9, 21.3, 21.8)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A study file with nine runs."""
    monkeypatch.chdir(ROOT)
    file = write_study(tmp_path, directory=str(tmp_path / "runs"))
    study = load_study(file)
    open_directory(study)
    for row, errors in zip(ROWS, (NONE, SE, HGA), strict=True):
        for seed, error in enumerate(errors):
            write_result(study.directory / row / f"seed_{seed}", error)
    return file, study


def by_row(told):
    return {row["row"]: row for row in told["rows"]}


def test_known_means_and_scipy_s_interval(made):
    told = results.analyse(results.load(made[0]))
    rows = by_row(told)
    assert rows["none"]["mean"] == 21.0 and rows["none"]["sd"] == 1.0 and rows["none"]["verdict"] == "baseline"
    assert rows["se"]["mean"] == pytest.approx(19.833333) and rows["se"]["difference"] == pytest.approx(-3.5 / 3)
    for name, errors in (("se", SE), ("hga", HGA)):
        known = stats.ttest_rel(errors, NONE)
        interval = known.confidence_interval(0.95)
        assert (rows[name]["low"], rows[name]["high"]) == pytest.approx((interval.low, interval.high))
        assert rows[name]["p"] == pytest.approx(known.pvalue) and rows[name]["verdict"] == "not told apart"
    assert rows["se"]["p_holm"] == pytest.approx(2 * rows["se"]["p"])
    assert told["correction"] == "Holm, over 2 comparisons"


def test_another_baseline_and_another_metric(made):
    rows = by_row(results.analyse(results.load(made[0]), "loss", "hga"))
    assert rows["hga"]["verdict"] == "baseline" and rows["hga"]["baseline"] is None
    assert rows["none"]["baseline"] == "hga" and rows["none"]["difference"] == pytest.approx((21 - 21) / 50)
    with pytest.raises(UserError, match="no such row; did you mean 'hga'"):
        results.analyse(results.load(made[0]), baseline="hgaa")


def test_every_number_leads_to_its_run(made):
    for row in results.load(made[0])["rows"]:
        for run in row["runs"]:
            kept = json.loads((pathlib.Path(run["workdir"]) / "result.json").read_text())
            assert kept["top1_error"] == run["top1_error"]
            assert run["command"].endswith(f"--config.seed={run['seed']} --workdir={run['workdir']}")
            assert f"--config.model.attention={row['row']}" in run["command"]


def test_a_file_its_folder_and_its_saved_report_say_the_same(made, tmp_path):
    file, study = made
    told = results.analyse(results.load(file))
    saved = tmp_path / "saved" / "made_up.json"
    write_text(saved, json.dumps(told))
    for source in (str(study.directory), str(saved)):
        assert results.analyse(results.load(source)) == told
    # Nothing that was worked out is believed: it is worked out again.
    told["rows"][1]["mean"] = 0.0
    write_text(saved, json.dumps(told))
    assert by_row(results.analyse(results.load(str(saved))))["se"]["mean"] == pytest.approx(19.833333)


def test_costs_are_those_of_the_network(made):
    rows = by_row(results.load(made[0]))
    assert rows["none"]["params"] == 5142 and rows["se"]["params"] > 5142 and rows["hga"]["gflops"] > 0
    assert rows["none"]["step_ms"] is None
    folder = made[1].directory
    write_text(folder / "made_up.step_times.json", json.dumps({"step_ms": {"none": 3.5}}))  # of an older version
    assert by_row(results.load(made[0]))["none"]["step_ms"] == 3.5
    write_text(folder / "made_up.step_times.json", json.dumps({"device": "X", "devices": 8, "step_ms": {"none": 3.5}}))
    told = results.analyse(results.load(made[0]))
    assert told["timed_on"] == "8 x X"
    assert "Steps timed on: 8 x X, other hardware than that of the runs." in tables.notes(told)


def test_a_time_measured_before_a_row_was_made_anew_is_not_shown(made):
    _, study = made
    row = study.directory / "hga" / "row.json"
    timed = {"step_ms": {"hga": 20.0}}
    assert results._step_ms(timed, study.directory, "hga") == 20.0  # an older version's
    timed["networks"] = {"hga": fingerprint(row.parent)}
    assert results._step_ms(timed, study.directory, "hga") == 20.0
    row.write_text(to_json(study.rows["se"].config))
    assert results._step_ms(timed, study.directory, "hga") is None
    with pytest.raises(UserError, match="is the record of a study, not a saved report: name its folder, "):
        results.load(str(study.directory / f"{study.name}.json"))


def test_a_row_that_nothing_is_compared_with_is_no_baseline(tmp_path):
    baseline = {"hga": "none"}
    study = load_study(write_study(tmp_path, baseline=baseline, directory=str(tmp_path / "runs")))
    for row in study.rows:
        write_result(study.directory / row / "seed_0", 1.0)
    told = by_row(results.analyse(results.load(study.file)))
    assert [told[row]["verdict"] for row in ("none", "se")] == ["baseline", "not compared"]


def test_a_saved_value_that_is_not_finite_is_left_out(made, tmp_path):
    told = results.load(made[0])
    told["rows"][0]["runs"][0]["top1_error"] = float("nan")
    write_text(tmp_path / "saved.json", json.dumps(told))
    told = results.analyse(results.load(str(tmp_path / "saved.json")))
    assert told["rows"][0]["seeds"] == 2 and "nan" not in tables.render(told, "terminal")
    assert any(note.startswith("Left out: none seed 0") for note in tables.notes(told))


def test_what_is_missing_or_failed_is_told(made):
    file, study = made
    (study.directory / "se" / "seed_1" / "result.json").unlink()
    (study.directory / "se" / "seed_2" / "result.json").unlink()
    write_text(study.directory / "se" / "seed_2" / "failure.json", json.dumps({"error": "it diverged"}))
    row = by_row(results.analyse(results.load(file)))["se"]
    assert row["missing"] == [1] and row["failed"] == [{"seed": 2, "error": "it diverged"}] and row["seeds"] == 1
    assert row["pairs"] == 1 and row["p"] is None and row["verdict"] == "one seed: nothing can be said"


def test_what_cannot_be_reported_is_one_line(made, tmp_path):
    file, study = made
    for source, message in (
        (str(tmp_path / "absent.json"), "no such file"),
        (str(tmp_path / "absent.py"), "no such file"),
        (str(study.directory / "none"), "no study here"),
    ):
        with pytest.raises(UserError, match=message):
            results.load(source)
    with pytest.raises(UserError, match=f"no runs yet.* {file} --dir={tmp_path}/other --config.model.dtype=float32$"):
        results.load(file, str(tmp_path / "other"), overrides=["--config.model.dtype=float32"])
    write_text(study.directory / "second.json", (study.directory / "made_up.json").read_text())
    with pytest.raises(UserError, match="holds several studies"):
        results.load(str(study.directory))
    write_text(tmp_path / "bad.json", json.dumps({"rows": [{"row": "a"}]}))
    with pytest.raises(UserError, match="is not a saved report"):
        results.load(str(tmp_path / "bad.json"))
    write_text(study.directory / "se" / "row.json", to_json(study.rows["hga"].config))
    with pytest.raises(UserError, match="row 'se' was started with another configuration"):
        results.load(file)


def test_a_run_whose_loss_is_not_finite_is_counted_and_named(made):
    file, study = made
    result = study.directory / "se" / "seed_1" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"loss": None}))
    told = results.analyse(results.load(file), "loss")
    line = next(cells for cells in tables.table(told)[1] if cells[0] == "se")
    assert line[1] == "2 of 3" and "Left out: se seed 1: its loss is not finite." in tables.notes(told)


def test_a_study_whose_attention_is_not_known_here_is_reported_without_its_size(made, monkeypatch):
    file, _ = made
    refuse = lambda *a: (_ for _ in ()).throw(UserError("unknown attention 'mine'"))
    monkeypatch.setattr(results, "build_model", refuse)
    told = results.analyse(results.load(file))
    assert {row["params"] for row in told["rows"]} == {None}
    assert "se: parameters not known: unknown attention 'mine'" in tables.notes(told)


def test_the_data_of_a_run_is_told_from_another_under_its_name(tmp_path):
    info = DatasetInfo("folder", 2, 3, ("a", "b"), {"train": 1_200, "val": 5}, {"train": "x", "val": "y"})
    lines = []
    for change in ({}, {}, {"class_names": ("a", "c")}, {"digests": {"train": "z", "val": "y"}}):
        (tmp_path / "dataset.json").unlink(missing_ok=True)
        write_dataset(tmp_path, dataclasses.replace(info, **change))
        lines.append(results._data(tmp_path))
    assert lines[0] == lines[1] and len(set(lines)) == 3
    assert re.fullmatch(r"folder: 2 classes, 1,200 in train, 5 in val \(checksum \w{8}\)", lines[0])
    (tmp_path / "dataset.json").unlink()
    assert results._data(tmp_path) is None


def test_a_row_that_has_not_begun_is_unfinished_and_no_more(made):
    file, study = made
    (study.directory / "se" / "row.json").unlink()
    told = results.analyse(results.load(file))
    row = next(row for row in told["rows"] if row["row"] == "se")
    assert row["params"] is None and not row.get("uncounted") and "not known" not in tables.notes(told)


def test_the_modules_that_a_study_imported_are_in_its_commands_and_its_hints(made, monkeypatch):
    file, study = made
    monkeypatch.setattr(command_line, "_imported", ["my_attention"])
    open_directory(study)
    monkeypatch.setattr(command_line, "_imported", [])
    for source in (file, str(study.directory)):
        for row in results.load(source)["rows"]:
            for run in row["runs"]:
                assert run["command"].count("--import=my_attention") == 1 and "uncounted" not in row
    monkeypatch.setattr(results, "build_model", lambda *a: (_ for _ in ()).throw(UserError("unknown")))
    assert results.load(file)["rows"][0]["uncounted"] == "unknown; try --import=my_attention"


@pytest.mark.medium
@pytest.mark.parametrize("removes", ["top", "row", "run"])
def test_a_saved_report_may_lack_what_is_not_compared(made, tmp_path, removes):
    """Each key in turn is left out: the report is made without it, or refused in one line."""
    told = json.loads(json.dumps(results.analyse(results.load(made[0]))))
    place = lambda values: {"top": values, "row": values["rows"][0], "run": values["rows"][1]["runs"][0]}[removes]
    refused = []
    for key in place(told):
        cut = json.loads(json.dumps(told))
        del place(cut)[key]
        write_text(tmp_path / "cut.json", json.dumps(cut))
        try:
            again = results.analyse(results.load(str(tmp_path / "cut.json")))
            assert [tables.render(again, form) for form in tables.FORMATS] and tables.run_lines(again)
            assert draw_costs(again, tmp_path, "top-1 error, %")
        except UserError as error:
            assert "is not a saved report" in str(error) and key in str(error)
            refused.append(key)
    needed = {"top": {"study", "seeds", "rows"}, "row": {"row", "runs", "missing", "failed", "baseline"}}
    assert set(refused) == needed.get(removes, {"seed", "top1_error"})


def test_a_saved_report_without_its_baseline_is_refused(made, tmp_path):
    told = results.analyse(results.load(made[0]))
    write_text(tmp_path / "cut.json", json.dumps(told | {"rows": told["rows"][1:]}))
    with pytest.raises(UserError, match="there is no row none, the baseline of se"):
        results.load(str(tmp_path / "cut.json"))
