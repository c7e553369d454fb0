import json
import re

import cv2
import numpy as np
import pytest

from hga_flax.config.command_line import add_weights_flags, names_weights, parse_with_weights
from hga_flax.errors import ArgumentParser, UserError
from hga_flax.inference.from_weights import CIFAR10
from tests import commands
from tests.inference.test_from_weights import cifar_file
from tests.test_train import SHORT, TINY


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = commands.run(*TINY, *SHORT, "--config.evaluation.batch_size=16", f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


def evaluate(workdir, *arguments, **options):
    return commands.run("evaluate.py", f"--workdir={workdir}", *arguments, **options)


@pytest.mark.medium
def test_the_table_and_the_json_line_agree_with_training(workdir):
    result = evaluate(workdir, "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert set(row) == {"top1_error", "top5_error", "loss", "num_examples", "step", "split", "weights"}
    logged = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["top1_error"] == logged["eval/top1_error"] and row["loss"] == pytest.approx(logged["eval/loss"])
    assert (row["num_examples"], row["step"], row["split"]) == (40, 2, "test")
    assert f"{row['top1_error']:.2f} %" in result.stdout


@pytest.mark.medium
def test_batch_size_and_devices_change_nothing(workdir):
    one = json.loads(evaluate(workdir, "--json").stdout.splitlines()[-1])
    many = json.loads(evaluate(workdir, "--json", "--batch-size=7", devices=4).stdout.splitlines()[-1])
    assert many.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-5)
    assert many == one


@pytest.mark.medium
def test_a_run_named_by_its_weights_evaluates_alike(workdir):
    there = json.loads(evaluate(workdir, "--json").stdout.splitlines()[-1])
    result = commands.run("evaluate.py", f"--weights={workdir}@latest", "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["loss"] == pytest.approx(there["loss"], rel=1e-6) and row["num_examples"] == there["num_examples"]
    assert row["step"] == there["step"] == 2


@pytest.mark.medium
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=w.pth"], "--config=FILE is missing"),
        (["--weights=w.pth", "--workdir=x"], "with --workdir choose ema or raw"),
        (["--weights=ema"], "--workdir=DIR is missing: the folder of the run"),
        ([], "--workdir=DIR is missing: the folder of the run; or give --weights=FILE"),
        (["--weights=runs/x", "--checkpoint=latest"], "for the folder of a run write --weights=DIR@latest"),
        (["--workdir=x", "--model=resnet50"], "--model: only for --weights=FILE"),
        (["--workdir=x", "--config.data.dir=y"], "--config.data.dir=y: only for --weights=FILE"),
    ],
)
def test_weights_and_runs_have_their_own_flags(arguments, message):
    parser = ArgumentParser()
    add_weights_flags(parser)
    parser.add_argument("--checkpoint", default="best")
    if "--config=FILE" in message:
        assert names_weights(parse_with_weights(parser, arguments))
        return
    with pytest.raises(UserError, match=re.escape(message)):
        parse_with_weights(parser, arguments)


def test_a_public_checkpoint(tmp_path):
    """By the command, on a folder that has no training split."""
    (tmp_path / "images").mkdir()
    for place, name in enumerate(CIFAR10):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        pixels = np.full((32, 32, 3), 25 * place, np.uint8)
        cv2.imwrite(str(tmp_path / "images" / "val" / name / "0.png"), pixels)
    result = commands.run(
        "evaluate.py", f"--weights={cifar_file(tmp_path)}", "--model=cifar_resnet8", "--config=configs/cifar10.py",
        "--config.data.name=folder", f"--config.data.dir={tmp_path / 'images'}", "--config.data.eval_split=val",
        "--config.data.mean=0.5,0.5,0.5", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert (row["num_examples"], row["model"]) == (10, "cifar_resnet8")
    assert "read as pytorch_resnet_cifar10/resnet8" in result.stdout and "0.5, 0.5, 0.5; 0.229" in result.stdout
