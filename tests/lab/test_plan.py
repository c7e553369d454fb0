"""The plan of a study, and what is found wrong before the first run."""

import pytest

from hga_flax.errors import UserError
from hga_flax.lab import plan
from hga_flax.lab.runs import write_text
from hga_flax.lab.study import load_study
from tests.commands import ROOT
from tests.lab.made_up import ROWS, TINY, write_result, write_study


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_row_that_cannot_be_trained_is_found_before_the_first_run(tmp_path):
    for bad, message in (
        ("model.attention_options=kernels=(2,)", "row 'bad': config.model cannot be built: kernels="),
        ("training.batch_size=64", "row 'bad': training.batch_size=64"),
    ):
        rows = {"none": [], "bad": ["model.attention=hga", bad]}
        with pytest.raises(UserError, match=message):
            plan.check_rows(load_study(write_study(tmp_path, rows=rows)))


def test_initial_weights_are_looked_for_before_the_first_run(tmp_path):
    rows = {"none": [], "bad": ["model.attention=se", f"init.weights={tmp_path / 'absent.pth'}"]}
    with pytest.raises(UserError, match=r"row 'bad': init.weights=.*absent\.pth: there is no such file or folder"):
        plan.check_rows(load_study(write_study(tmp_path, rows=rows)))


def test_the_plan_shows_what_each_row_overrides_beside_flags_too(tmp_path, monkeypatch, capsys):
    flags = ["--config.training.steps=3"]  # the file's epochs have no effect any more
    common = [*(item for item in TINY if "training.steps" not in item), "training.epochs=9"]
    study = load_study(write_study(tmp_path, overrides=common), str(tmp_path), overrides=flags)
    monkeypatch.setattr(plan, "counted_seconds", lambda row: 120.0)
    plan.print_plan(study, workers=1, minutes=0, retry=False, estimate=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "operations model.attention=se" in printed
    assert "training.steps=3" in printed and "training.epochs=9" not in printed


def test_a_row_with_a_run_is_not_built_again(tmp_path, monkeypatch):
    study, built = load_study(write_study(tmp_path), str(tmp_path / "runs")), []
    write_result(study.directory / "se" / "seed_2", 1.0)
    monkeypatch.setattr(plan, "prepare", lambda experiment: built.append(experiment.config.model.attention))
    plan.check_rows(study)
    assert built == ["none", "hga"]


def test_data_that_are_not_prepared_are_found_before_the_first_run(tmp_path):
    real = [item for item in TINY if "fake" not in item]
    rows = {"none": ["data.name=cifar10", "data.train_split=train", f"data.dir={tmp_path}"]}
    with pytest.raises(UserError, match=r"row 'none'.*prepare cifar10"):
        plan.check_rows(load_study(write_study(tmp_path, overrides=real, rows=rows)))


def test_the_plan_counts_and_estimates_from_runs_already_made(tmp_path, monkeypatch, capsys):
    study = load_study(write_study(tmp_path, budget_minutes=30), str(tmp_path / "runs"))
    for seed, seconds in ((0, 50.0), (1, 70.0)):
        write_result(study.directory / "none" / f"seed_{seed}", 1.0, seconds=seconds)
    write_result(study.directory / "se" / "seed_0", 1.0, seconds=9999.0, sessions=2)  # its last session alone
    monkeypatch.setattr(plan, "counted_seconds", lambda row: 120.0)
    plan.print_plan(study, workers=2, minutes=study.budget_minutes, retry=False, estimate=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "9: 3 done, 6 to do" in printed
    assert "none - 2 1 1:00 2 runs" in printed and "se none 1 2 2:00 operations" in printed
    # 1 of a minute, 2 and 3 of two minutes
    assert "about 11:00 for one worker, 5:30 for 2" in printed and "none that would end after 30 minutes" in printed


def test_the_plan_is_that_of_its_own_flags(tmp_path, capsys):
    study = load_study(write_study(tmp_path, budget_minutes=60), str(tmp_path / "runs"))
    write_text(study.directory / "none" / "seed_0" / "failure.json", '{"error": "it diverged"}')
    write_text(study.directory / "se" / "seed_0" / "failure.json", '{"error": "after its last step"}')
    write_result(study.directory / "se" / "seed_0", 1.0)  # a result counts, whatever came after it
    plan.print_plan(study, workers=1, minutes=0, retry=False, estimate=False)
    assert "9: 1 done, 7 to do, 1 failed (--retry repeats them)" in " ".join(capsys.readouterr().out.split())
    plan.print_plan(study, workers=1, minutes=0, retry=True, estimate=False)
    assert "9: 1 done, 8 to do, 1 failed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.medium
def test_operations_make_an_estimate(tmp_path, monkeypatch):
    study = load_study(write_study(tmp_path, rows=ROWS | {"long": ["model.attention=none", "training.steps=200"]}))
    monkeypatch.setattr(plan, "step_seconds", lambda experiment, flops: flops / 1e9)
    short, long = (plan.counted_seconds(study.rows[name]) for name in ("none", "long"))
    assert 0 < short < long < 100 * short * 1.01
    assert plan.counted_seconds(study.rows["hga"]) > short
    more = ["evaluation.image_size=32", "evaluation.every_epochs=0.05"]  # like train.py --dry-run, see test_dry_run.py
    study = load_study(
        write_study(tmp_path, "larger", rows={"larger": ["model.attention=none", *more]}, baseline="larger")
    )
    assert plan.counted_seconds(study.rows["larger"]) > 5 * short
