"""The report as text."""

import csv
import io
import json

import pytest

from hga_flax.lab import tables
from hga_flax.lab.results import analyse


def gathered(se=(19.0, 20.5, 20.0), **row):
    """Results as `load` returns them: two rows of three seeds."""

    def make(name, baseline, errors):
        runs = [
            {"seed": s, "top1_error": e, "loss": e / 50, "device": "2 CPU cores", "workdir": f"d/{name}/seed_{s}",
             "command": f"python train.py --config.seed={s}"}
            for s, e in enumerate(errors)
        ]  # fmt: skip
        missing = list(range(len(errors), 3))
        facts = {"row": name, "overrides": ["--config.model.attention=" + name], "baseline": baseline, "runs": runs}
        return facts | {"missing": missing, "failed": [], "params": 1234, "gflops": 0.01, "step_ms": None}

    rows = [make("none", None, (20.0, 21.0, 22.0)), make("se", "none", se) | row]
    return {"study": "made_up", "about": "What?", "seeds": [0, 1, 2], "rows": rows}


def test_the_terminal_s_table():
    text = tables.render(analyse(gathered()), "terminal")
    assert text.startswith("study made_up: What?\n")
    line = next(line for line in text.splitlines() if line.startswith("se "))
    # Differences -1, -0.5, -2: mean -1.1667, deviation 0.7638; t(0.975, 2) = 4.3027; half 1.8973.
    assert " ".join(line.split()) == "se 3 19.83 ± 0.76 -1.17 -3.06 ... +0.73 0.12 not told apart 1,234 10"
    assert "MFLOPs" in text and "Holm, over 1 comparison." in text and "Half an interval is 1.9 points" in text
    assert "(3 runs)" not in text and "2 CPU cores (6 runs)" in text and "UNFINISHED" not in text


def test_an_unfinished_study_says_so():
    failed = [{"seed": 2, "error": "it diverged"}]
    text = tables.render(analyse(gathered(se=(19.0,), missing=[1], failed=failed)), "terminal")
    assert "1 of 3" in text and "one seed: nothing can be said" in text
    assert "UNFINISHED: 1 of 6 runs are not made yet." in text and "Failed: se seed 2: it diverged" in text


def test_markdown_is_a_table():
    lines = tables.render(analyse(gathered()), "markdown").splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1 and set(lines[1]) <= set("|-: ")
    assert lines[3].startswith("| se ") and "not told apart" in lines[3]


def test_csv_and_json_hold_every_number():
    told = analyse(gathered())
    rows = list(csv.DictReader(io.StringIO(tables.render(told, "csv"))))
    assert [row["row"] for row in rows] == ["none", "se"]
    for key in ("mean", "sd", "difference", "low", "high", "p", "p_holm"):
        assert float(rows[1][key]) == pytest.approx(told["rows"][1][key])
    assert rows[0]["difference"] == ""
    assert json.loads(tables.render(told, "json")) == told


def test_every_cell_is_traced_to_its_runs():
    lines = tables.run_lines(analyse(gathered(se=(19.0, 20.5))))
    assert len(lines) == 6 and lines[3].split()[:5] == ["se", "seed", "0", "19", "d/se/seed_0"]
    assert lines[3].endswith("python train.py --config.seed=0") and lines[5].endswith("not made yet")


def test_rows_with_several_baselines_name_them():
    told = gathered()
    told["rows"].append(told["rows"][1] | {"row": "hga", "baseline": "se"})
    header, cells = tables.table(analyse(told))
    assert header[4] == "to" and [line[4] for line in cells] == ["", "none", "se"]


def test_loss_has_more_digits_and_probabilities_few():
    text = tables.render(analyse(gathered(), "loss"), "terminal")
    assert "0.3967 ± 0.0153" in text and "loss is" in text
    assert [tables.probability(p) for p in (0.0001, 0.0123, 0.456)] == ["< 0.001", "0.012", "0.46"]
    assert [tables.probability(p) for p in (0.0496, 0.0504)] == ["0.04960", "0.05040"]  # significant or not


def test_runs_of_other_hardware_are_said_to_be_so():
    told = analyse(gathered())
    for name in ("1 CPU core", "1 CPU thread"):  # older versions' name of the same
        told["rows"][0]["runs"][0]["device"] = name
        text = tables.render(told, "terminal")
        assert "MIXED: the runs were not all made on the same hardware" in text and "2 CPU cores (5 runs)" in text
    for row in told["rows"]:
        for run in row["runs"]:
            run["device"] = "1 CPU core" if run["seed"] else "1 CPU thread"
    assert "MIXED" not in tables.render(told, "terminal")
    told["rows"][0]["runs"][1]["devices"] = 4
    assert "MIXED" in tables.render(told, "terminal") and "4 x 1 CPU core (1 runs)" in tables.render(told, "terminal")


def test_runs_of_other_versions_and_differences_over_fewer_seeds_are_said():
    told = analyse(gathered(se=(19.0, 20.5)))
    text = " ".join(tables.render(told, "terminal").split())
    assert "se: its difference is over the 2 seeds that it has in common with its baseline" in text
    assert "versions" not in text
    told["rows"][0]["runs"][0] |= {"jax": "0.10.2", "hga_flax": "0.1"}
    text = " ".join(tables.render(told, "terminal").split())
    assert (
        "MIXED: the runs were made with several versions, which may change the results: jax 0.10.2, hga_flax 0.1"
        in text
    )


def test_runs_on_other_images_under_one_name_are_said():
    told = analyse(gathered(se=(19.0, 20.5)))
    runs = [run for row in told["rows"] for run in row["runs"]]
    for run in runs:
        run["data"] = "folder: 3 classes, 90 in train (checksum 1)"
    runs[0]["data"] = "digits: 10 classes, 1,500 in train (checksum 3)"  # a row's own data set
    assert "same classes" not in tables.render(told, "terminal")
    runs[1]["data"] = "folder: 3 classes, 60 in train (checksum 2)"
    text = " ".join(tables.render(told, "terminal").split())
    assert "MIXED: the runs were not all made on the same classes and images: folder: 3 classes, 60 in" in text
    assert "digits" not in text.partition("classes and images:")[2].partition("runs).")[0]
