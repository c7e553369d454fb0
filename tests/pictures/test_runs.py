"""`python -m hga_flax runs`: workdirs of this and of an older version, whole and damaged, in one table."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError
from hga_flax.pictures.runs import find_runs
from hga_flax.runs.run_folder import run_folder
from hga_flax.training.trainer import train
from tests.commands import ROOT, run
from tests.training import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `old`, as version 0.1 left it, and `new/seed_10`, 6 of 6 steps counted in epochs."""
    folder = tmp_path_factory.mktemp("made")
    with tarfile.open(ROOT / "tests" / "training" / "old_workdir.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    (folder / "old_workdir").rename(folder / "old")
    train(tiny.config(training__steps=0, training__epochs=2.0, evaluation__every_epochs=1.0), f"{folder}/new/seed_10")
    return folder


@pytest.fixture
def runs(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs", copy_function=shutil.copy2)
    return tmp_path / "runs"


def listed(capsys, *arguments):
    """Returns ({name: row}, the lines of standard error)."""
    main(["runs", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return {pathlib.Path(row["workdir"]).name: row for row in json.loads(out)}, err.splitlines()


@pytest.mark.medium
def test_an_old_and_a_new_run_in_one_table_as_a_subprocess(runs):
    (runs / "empty").mkdir()
    (runs / "torn").mkdir()
    (runs / "torn" / "config.json").write_text('{"model": {"na')
    done = run("-m", "hga_flax", "runs", runs)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1 and f"{runs}/torn/config.json cannot be read" in done.stderr
    head, new, old = done.stdout.splitlines()
    assert head.split()[:4] == ["workdir", "network", "attention", "data"]
    columns = r"(\S+) +cifar_resnet8\(features=4\) +hga +digits( \(synthetic\))? +(\d+ of \d+) +(\d+\.\d\d %)"
    when = r" +\d{4}-\d\d-\d\d \d\d:\d\d +complete$"
    assert re.match(columns + when, old).groups() == (f"{runs}/old", None, "60 of 60", "52.19 %")
    assert re.match(columns + when, new).groups()[:3] == (f"{runs}/new/seed_10", " (synthetic)", "6 of 6")


@pytest.mark.medium
def test_json_says_what_the_run_says(runs, capsys):
    rows, said = listed(capsys, runs)
    assert not said and list(rows) == ["seed_10", "old"]
    old = rows["old"]
    assert (old["best_error"], old["best_step"]) == (52.18855218855219, 60)  # as in its metrics.jsonl
    assert old["complete"] and old["planned_steps"] == old["saved_step"] == 60
    new = rows["seed_10"]
    logged = [json.loads(line) for line in (runs / "new" / "seed_10" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [(row["eval/top1_error"], row["eval/loss"], row["step"]) for row in logged if "eval/loss" in row]
    assert len(evaluations) == 2 and (new["best_error"], new["best_step"]) == min(evaluations)[::2]
    assert new["fake"] and new["planned_steps"] == new["steps"] == 6 and new["complete"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", new["written"])


@pytest.mark.medium
def test_neither_jax_nor_orbax_is_loaded(runs):
    script = (
        f"import sys; from hga_flax.__main__ import main; main(['runs', {str(runs)!r}]); "
        "print(*{'jax', 'orbax', 'matplotlib', 'cv2'} & set(sys.modules), sep='', end='end')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "end" and len(done.stdout.splitlines()) == 4, done.stderr


def test_fifty_runs_take_no_time(runs, capsys):
    for number in range(50):
        shutil.copytree(runs / "old", runs / f"run_{number}")
    began = time.monotonic()
    rows, _ = listed(capsys, runs)
    assert time.monotonic() - began < 10 and len(rows) == 52
    assert list(rows)[-50:] == [f"run_{number}" for number in range(50)]  # 2 before 10


def test_a_run_that_is_not_over(runs, capsys):
    """Its steps follow from its epochs; before the first checkpoint from the data set's size."""
    new = runs / "new" / "seed_10"
    config = json.loads((new / "config.json").read_text())
    config["training"]["epochs"] = 4.0
    (new / "config.json").write_text(json.dumps(config))
    row = listed(capsys, new)[0]["seed_10"]
    assert (row["steps"], row["planned_steps"], row["state"]) == (6, 12, "unfinished")
    shutil.rmtree(new / "checkpoints")
    (new / "newest_checkpoint.json").unlink()
    row = listed(capsys, new)[0]["seed_10"]
    assert (row["steps"], row["planned_steps"], row["saved_step"], row["state"]) == (6, 12, None, "unfinished")
    assert row["best_error"] is not None
    for name in ("dataset.json", "metrics.jsonl"):
        (new / name).unlink()
    row = listed(capsys, new)[0]["seed_10"]
    assert (row["steps"], row["planned_steps"], row["best_error"]) == (0, None, None)


def test_an_evaluation_that_is_due_keeps_a_run_from_being_complete(runs, capsys):
    kept = runs / "new" / "seed_10" / "checkpoints" / "6" / "run" / "metadata"
    text = kept.read_text()
    assert '"evaluation_due": false' in text
    kept.write_text(text.replace('"evaluation_due": false', '"evaluation_due": true'))
    assert listed(capsys, runs)[0]["seed_10"]["state"] == "unfinished"


def test_a_run_that_trains_now_is_said_to(runs, capsys):
    with run_folder(str(runs / "old"), 0):
        assert listed(capsys, runs)[0]["old"]["state"] == "running"
    assert listed(capsys, runs)[0]["old"]["state"] == "complete"
    claim = next((runs / "old").glob(".trained_by.*"))
    claim.write_text(json.dumps({"machine": "elsewhere", "host": "elsewhere", "pid": 1, "start": "1"}))
    assert listed(capsys, runs)[0]["old"]["state"] == "running"
    for since in (3600, -3600):  # by a clock that is ahead
        os.utime(claim, (time.time() - since,) * 2)
        assert listed(capsys, runs)[0]["old"]["state"] == "complete"


def no_config(folder):
    (folder / "config.json").unlink()


def dangling_links(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").symlink_to("/nowhere/config.json")


def another_config(folder):
    (folder / "config.json").write_text('{"model": {"name": "resnet50"}}')


def a_number_for_a_name(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["name"] = 7
    (folder / "config.json").write_text(json.dumps(config))


def no_metrics(folder):
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n[]\n")


def no_checkpoints(folder):
    shutil.rmtree(folder / "checkpoints")


def torn_metadata(folder):
    (folder / "checkpoints" / "60" / "run" / "metadata").write_text('{"run": 1')


@pytest.mark.parametrize(
    ("damage", "remains", "line"),
    [
        (no_config, False, "no config.json"),
        (dangling_links, False, "only links to files that are gone"),
        (another_config, False, "no model.options"),
        (a_number_for_a_name, False, "model.name is 7"),
        (no_metrics, True, "it holds no metrics"),
        (no_checkpoints, True, "its checkpoint of step 60, which was complete, is gone"),
        (torn_metadata, True, "run/metadata"),
    ],
)
def test_damage_is_one_line_and_stops_nothing(runs, capsys, damage, remains, line):
    damage(runs / "old")
    rows, said = listed(capsys, runs)
    assert "seed_10" in rows and ("old" in rows) == remains
    assert len(said) == 1 and line in said[0] and str(runs / "old") in said[0]
    if remains:  # the error is in two places
        assert rows["old"]["best_error"] == 52.18855218855219 and rows["old"]["steps"] == 60


def test_folders_that_are_no_runs_are_passed_over(runs, capsys):
    for name in ("bert", ".cache"):
        (runs / name).mkdir()
    (runs / "bert" / "config.json").write_text('{"hidden_size": 768}')
    shutil.copytree(runs / "old", runs / ".cache" / "copy")
    rows, said = listed(capsys, runs)
    assert set(rows) == {"seed_10", "old"} and not said


def test_links_are_followed_once(runs, tmp_path):
    (runs / "new" / "up").symlink_to(runs)
    (runs / "a").symlink_to("b")
    (runs / "b").symlink_to("a")
    (runs / "also_old").symlink_to(runs / "old")
    elsewhere = tmp_path / "elsewhere"
    (runs / "old").rename(elsewhere)
    (runs / "also_old").unlink()
    (runs / "old").symlink_to(elsewhere)
    assert list(find_runs(runs, pytest.fail)) == [runs / "new" / "seed_10", runs / "old"]
    assert list(find_runs(tmp_path, pytest.fail)) == [elsewhere, runs / "new" / "seed_10"]  # by its own name


def test_the_order_can_be_chosen(runs, capsys):
    def order(by):
        main(["runs", str(runs), f"--sort={by}", "--json"])
        return json.loads(capsys.readouterr().out)

    errors = [row["best_error"] for row in order("error")]
    assert errors == sorted(errors)
    assert [pathlib.Path(row["workdir"]).name for row in order("written")] == ["seed_10", "old"]


def test_a_folder_that_cannot_be_searched_does_not_stop_the_others(runs, capsys):
    with pytest.raises(UserError, match="could not search 3 of 5 folders"):
        main(["runs", "gs://bucket/runs", "nope", str(runs / "old" / "config.json"), str(runs), str(runs / "old")])
    out, err = capsys.readouterr()
    assert out.count("\n") == 3  # each run once
    for line, what in zip(
        err.splitlines(), ("runs in buckets are not listed", "no such folder", "a file"), strict=True
    ):
        assert what in line
    with pytest.raises(UserError, match="no run that can be listed"):
        main(["runs", str(ROOT / "docs")])
