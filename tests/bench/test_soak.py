import json
import pathlib
import random
import shutil
import time

import pytest

from hga_flax.__main__ import main
from hga_flax.bench import soak as module
from hga_flax.errors import UserError
from hga_flax.training.trainer import train
from tests import commands
from tests.test_train import TINY
from tests.training import tiny


def test_kills_are_spread_over_the_run_and_half_of_them_aimed_at_checkpoints():
    kills = module.plan_kills(10, 1000, random.Random(0))
    assert [kill.target for kill in kills] == sorted(kill.target for kill in kills)
    assert 0 <= kills[0].target < kills[-1].target < 800
    aims = [kill.aim for kill in kills]
    assert (aims.count("checkpoint"), aims.count("start"), aims.count("anywhere")) == (5, 2, 3)
    assert kills == module.plan_kills(10, 1000, random.Random(0)) != module.plan_kills(10, 1000, random.Random(1))


def test_what_an_earlier_kill_left_is_no_checkpoint_being_written(tmp_path):
    assert module._writing(tmp_path) == set()
    folder = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    folder.mkdir(parents=True)
    left = module._writing(tmp_path)
    assert len(left) == 1 and module._writing(tmp_path) - left == set()
    shutil.rmtree(folder)
    time.sleep(0.02)
    folder.mkdir()
    assert len(module._writing(tmp_path) - left) == 1


@pytest.mark.medium
def test_what_differs_is_found(tmp_path):
    train(tiny.config(training__steps=2), str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert module.compare(tmp_path / "a", tmp_path / "b") == []
    lines = (tmp_path / "b" / "metrics.jsonl").read_text()
    (tmp_path / "b" / "metrics.jsonl").write_text(
        lines.replace('"train/images_per_second": ', '"train/images_per_second": 1')
    )
    assert module.compare(tmp_path / "a", tmp_path / "b") == []  # timings may differ
    (tmp_path / "b" / "metrics.jsonl").write_text(lines.replace('"eval/loss": ', '"eval/loss": 1'))
    assert module.compare(tmp_path / "a", tmp_path / "b") == ["metrics.jsonl differs from line 2"]
    (tmp_path / "b" / "metrics.jsonl").write_text(lines.splitlines()[0] + "\n")
    assert module.compare(tmp_path / "a", tmp_path / "b") == ["metrics.jsonl differs from line 2"]


@pytest.mark.slow
def test_another_seed_is_another_state(tmp_path):
    for seed in (0, 1):
        train(tiny.config(seed=seed, training__steps=2), str(tmp_path / str(seed)))
    differences = module.compare(tmp_path / "0", tmp_path / "1")
    assert any(".params" in line for line in differences) and any("best checkpoint" in line for line in differences)


def test_bad_arguments_are_one_line(tmp_path):
    (tmp_path / "x").write_text("")
    config = "--config=configs/digits.py"
    for arguments, message in [
        (["--kills=0"], "--kills=0: must be at least 1"),
        ([f"--workdir={tmp_path}"], "needs a new or empty folder"),
        (["--config.training.steps=x"], "must be a whole number"),
    ]:
        with pytest.raises(UserError, match=message):
            main(["soak", config, *arguments])


@pytest.mark.medium
def test_a_session_that_fails_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"a session ended with exit code 1: error: .*one batch|training split has only"
    ):
        main(["soak", "--config=configs/digits.py", f"--workdir={tmp_path}", *TINY[2:],
              "--config.training.batch_size=100000"])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (8, (*TINY[2:], "--config.training.steps=60", "--config.checkpoint.every_steps=7")),
        (5, ("--config.training.epochs=6", "--config.evaluation.every_epochs=1")),  # the demo's own network
    ],
)
def test_digits_under_kills_end_with_the_bits_of_an_undisturbed_run(tmp_path, kills, options):
    done = commands.run(
        "-m", "hga_flax", "soak", "--config=configs/digits.py", f"--kills={kills}", "--json",
        f"--workdir={tmp_path}", *options, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["identical"] and result["differences"] == [] and len(result["kills"]) == kills
    assert result["checkpoint_writes_hit"] >= kills // 4
    assert {p.name for p in pathlib.Path(tmp_path).iterdir()} == {"undisturbed", "killed"}
