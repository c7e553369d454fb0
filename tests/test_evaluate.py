import json

import pytest

from tests import commands
from tests.test_train import SHORT, TINY


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = commands.run(*TINY, *SHORT, "--config.evaluation.batch_size=16", f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


def evaluate(workdir, *arguments, **options):
    return commands.run("evaluate.py", f"--workdir={workdir}", *arguments, **options)


def test_the_table_and_the_json_line_agree_with_training(workdir):
    result = evaluate(workdir, "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert set(row) == {"top1_error", "top5_error", "loss", "num_examples", "step", "split", "weights"}
    logged = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["top1_error"] == logged["eval/top1_error"] and row["loss"] == pytest.approx(logged["eval/loss"])
    assert (row["num_examples"], row["step"], row["split"]) == (40, 2, "test")
    assert f"{row['top1_error']:.2f} %" in result.stdout


def test_batch_size_and_devices_change_nothing(workdir):
    one = json.loads(evaluate(workdir, "--json").stdout.splitlines()[-1])
    many = json.loads(evaluate(workdir, "--json", "--batch-size=7", devices=4).stdout.splitlines()[-1])
    assert many.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
    assert many == one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=7"], "choose best, latest or one of the steps 2"),
        (["--checkpoint=newest"], "choose best, latest or one of the steps 2"),
        (["--batch-size=0"], "batch_size=0: must be at least 1"),
        (["--batch-size=x"], "invalid int value"),
        (["--weights=ema"], "weights=ema: this run keeps no average"),
        (["--workdir=/nowhere"], "no run here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(workdir, arguments, message):
    result = evaluate(workdir, *arguments)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and message in result.stderr
