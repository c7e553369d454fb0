import json
import os
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from hga_flax.runs.clock import TIMINGS
from hga_flax.training.restore import restore_workdir
from tests import commands

TINY = (
    "train.py",
    "--config=configs/digits.py",
    "--config.model.name=cifar_resnet8",
    "--config.data.image_size=8",
    "--config.training.batch_size=32",
    "--config.training.log_every_steps=5",
    "--config.training.compilation_cache=" + commands.os.environ["JAX_COMPILATION_CACHE_DIR"],
)
# A network of one block, which compiles in a third of the time, for runs that nothing interrupts: they would be over
# before a test could kill them.
ONE_BLOCK = (
    "--config.model.name=resnet18",
    "--config.model.options=stage_sizes=(1,), features=8",
    "--config.data.image_size=32",
)
SHORT = ("--config.training.steps=2", "--config.data.fake=true", "--config.data.fake_examples=40")


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def test_tensorflow_is_blocked_for_the_commands():
    assert "TensorFlow is blocked here" in commands.run("-c", "import tensorflow").stderr


@pytest.mark.medium
def test_a_run_killed_twice_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    long = (*TINY, "--config.training.steps=60", "--config.checkpoint.every_steps=7")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = commands.run(*long, f"--workdir={whole}")
    assert result.returncode == 0, result.stderr
    for after in (10, 35):  # SIGKILL once this many steps are logged
        process = commands.start(*long, f"--workdir={killed}")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            # Read once: a session that has no checkpoint yet empties the file that the one before it left.
            if (killed / "metrics.jsonl").exists() and any(row["step"] >= after for row in rows(killed)):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    result = commands.run(*long, f"--workdir={killed}")
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout and " s: imports " in result.stdout
    ours, expected = (restore_workdir(str(w), "latest") for w in (killed, whole))
    assert ours.step == expected.step == 60
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rows(killed) == rows(whole)  # and it logged the same numbers at the same steps


LONG = (
    *TINY,
    "--config.training.steps=60",
    "--config.training.log_every_steps=4",
    "--config.checkpoint.every_steps=6",
    "--config.evaluation.every_epochs=0.25",  # 12 steps
)


def stop(workdir, ready, signum=signal.SIGTERM):
    """Starts a run, signals it once `ready(workdir)`; returns (exit code, stderr, seconds to the end)."""
    process = commands.start(*LONG, f"--workdir={workdir}")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not ready(workdir):
        time.sleep(0.001)
    process.send_signal(signum)
    start = time.monotonic()
    _, error = process.communicate(timeout=60)
    return process.returncode, error, time.monotonic() - start


def logged(group, step):
    return lambda workdir: (
        (workdir / "metrics.jsonl").exists()
        and any(row["step"] >= step and f"{group}/loss" in row for row in rows(workdir))
    )


def evaluating(step):
    """Every twelfth step is logged and then evaluated: a run whose last line is of such a step evaluates it."""

    def ready(workdir):
        last = rows(workdir)[-1:] if (workdir / "metrics.jsonl").exists() else []
        return bool(last) and last[0]["step"] >= step and last[0]["step"] % 12 == 0 and "train/loss" in last[0]

    return ready


def writing(workdir):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def test_sigterm_ends_a_run_with_the_documented_code_and_the_step_saved(tmp_path):
    code, error, seconds = stop(tmp_path, logged("train", 4))
    assert code == 143 and seconds < 10, error
    (step,) = re.findall(r"stopped by SIGTERM after step (\d+), which is saved", error)
    assert error.count("\n") == 1 and (tmp_path / "checkpoints" / step).is_dir()


@pytest.mark.slow
def test_signals_at_every_place_and_a_run_that_goes_on_exactly(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert commands.run(*LONG, f"--workdir={whole}").returncode == 0
    for ready, signum, code in [
        (lambda workdir: (workdir / "config.json").exists(), signal.SIGTERM, 143),  # compiling: nothing to save
        (logged("train", 4), signal.SIGTERM, 143),
        (writing, signal.SIGTERM, 143),
        (logged("train", 24), signal.SIGINT, 130),
        (evaluating(36), signal.SIGTERM, 143),
        (evaluating(48), signal.SIGTERM, 143),
    ]:
        returned, error, seconds = stop(cut, ready, signum)
        assert returned == code and seconds < 10 and error.count("\n") == 1, error
    assert commands.run(*LONG, f"--workdir={cut}").returncode == 0
    ours, expected = (restore_workdir(str(w), "latest") for w in (cut, whole))
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rows(cut) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_run_and_its_worker_processes_is_one_line(tmp_path, signum, code):
    """Ctrl-C at a terminal reaches all processes of the command."""
    process = subprocess.Popen(
        commands.command(*LONG, "--config.data.num_workers=2", f"--workdir={tmp_path}"),
        cwd=commands.ROOT, env=commands.environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not logged("train", 4)(tmp_path):
        time.sleep(0.001)
    os.killpg(process.pid, signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and error.count("\n") == 1 and "which is saved" in error, error


@pytest.fixture
def read_only(tmp_path):
    """A finished run in a folder that cannot be written to, not even by root."""
    assert commands.run(*TINY, *SHORT, f"--workdir={tmp_path / 'run'}").returncode == 0
    view = tmp_path / "view"
    view.mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "run", view], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    subprocess.run(["mount", "-o", "remount,ro,bind", view], check=True)
    yield view
    subprocess.run(["umount", view], check=True)


@pytest.mark.slow
def test_a_read_only_workdir_can_be_evaluated_and_is_one_line_for_training(read_only):
    trained = commands.run(*TINY, *SHORT, f"--workdir={read_only}")
    assert trained.returncode == 1 and trained.stderr.count("\n") == 1, trained.stderr
    assert f"--workdir={read_only} cannot be written to: Read-only file system" in trained.stderr
    evaluated = commands.run("evaluate.py", f"--workdir={read_only}", "--json")
    assert evaluated.returncode == 0 and json.loads(evaluated.stdout.splitlines()[-1])["step"] == 2


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line(disk):
    """Of hundreds of arrays, most of which fail after Orbax has stopped to wait for them."""
    flags = ("--config.training.steps=9", "--config.checkpoint.every_steps=2", TINY[-1])
    done = commands.run("train.py", "--config=configs/digits.py", *flags, f"--workdir={disk / 'run'}")
    assert done.returncode == 1 and not (disk / "run" / "checkpoints" / "2").exists()
    *warnings, error = done.stderr.splitlines()
    assert error.startswith("error: the checkpoint of step ") and "No space left on device" in error
    assert all(line.startswith("warning: ") for line in warnings) and len(warnings) <= 1


@pytest.mark.medium
def test_a_complete_run_says_so_and_does_not_train_again(tmp_path):
    first = commands.run(*TINY, *SHORT, f"--workdir={tmp_path}")
    assert first.returncode == 0, first.stderr

    def files():  # but for the claim that a command holds while it runs
        there = [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith(".trained_by")]
        return {p: p.stat().st_mtime_ns for p in there}

    before = files()
    again = commands.run(*TINY, *SHORT, f"--workdir={tmp_path}")
    assert again.returncode == 0 and "training is complete" in again.stdout and "step      1" not in again.stdout
    assert files() == before


@pytest.mark.slow
def test_resnext50_on_synthetic_images_trains_saves_and_is_evaluated(tmp_path):
    result = commands.run(
        "train.py", "--config=configs/hga_resnext50.py", f"--workdir={tmp_path}", "--config.data.fake=true",
        "--config.data.fake_examples=6", "--config.training.steps=2", "--config.training.batch_size=4",
        "--config.data.image_size=32", TINY[-1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "26,128,680 parameters" in result.stdout  # PAPER.md: 26.129 M
    evaluated = commands.run("evaluate.py", f"--workdir={tmp_path}", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    row = json.loads(evaluated.stdout.splitlines()[-1])
    assert (row["num_examples"], row["step"], row["split"]) == (6, 2, "validation")


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimzer.learning_rate=1"], "no such key; did you mean 'optimizer.learning_rate'?"),
        (["--config.model.attention=hgaa"], "unknown attention 'hgaa'; did you mean 'hga'?; known: none, hga"),
        (
            ["--config.data.name=imagenet2012", "--config.data.mean=0.5", "--config.data.fake=false"],
            "is not prepared in",
        ),
        (["--config.data.mean=0.5,0.5"], "digits has 1 channel; give one number"),
        (["--workdir=/dev/null/x"], "--workdir=/dev/null/x cannot be written to"),
        (["--config.training.batch_size=41"], "the training split has only 40 examples"),
        (["--wrkdir=x"], "unrecognized arguments: --wrkdir=x"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(tmp_path, arguments, message):
    short = [flag for flag in SHORT if not ("fake_examples" in flag and "--config.data.fake=false" in arguments)]
    result = commands.run(*TINY, *short, f"--workdir={tmp_path}", *arguments)
    assert result.returncode == 1
    assert message in result.stderr and result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


@pytest.mark.medium
def test_another_models_workdir_is_refused(tmp_path):
    assert commands.run(*TINY, *SHORT, f"--workdir={tmp_path}").returncode == 0
    result = commands.run(*TINY, *SHORT, f"--workdir={tmp_path}", "--config.model.attention=none")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "there model.attention is 'hga', here 'none'" in result.stderr


@pytest.mark.medium
def test_divergence_stops_with_the_step_and_what_to_do(tmp_path):
    result = commands.run(*TINY, f"--workdir={tmp_path}", "--config.optimizer.learning_rate=1e30",
                          "--config.training.steps=20")  # fmt: skip
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert re.search(r"training diverged: the (loss of step \d+|gradient norm of step \d+) is nan", result.stderr)
    assert "optimizer.learning_rate" in result.stderr
    assert f"JAX_DEBUG_NANS=1 python train.py --config=configs/digits.py {TINY[2]}" in result.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_and_more_devices(tmp_path):
    options = (
        *TINY, *ONE_BLOCK, "--config.training.log_every_steps=1", "--config.schedule.name=constant",
        "--config.optimizer.learning_rate=0.01",
    )  # fmt: skip
    result = commands.run(*options, "--config.training.steps=16", f"--workdir={tmp_path / 'eight'}", devices=8)
    assert result.returncode == 0, result.stderr
    for steps, devices in ((4, 8), (8, 4), (12, 1), (16, 8)):
        result = commands.run(
            *options, f"--config.training.steps={steps}", f"--workdir={tmp_path / 'elastic'}", devices=devices
        )
        assert result.returncode == 0, result.stderr
        assert f"{devices} x cpu" in result.stdout
    loss = {
        name: [row["train/loss"] for row in rows(tmp_path / name) if "train/loss" in row]
        for name in ("eight", "elastic")
    }
    assert len(loss["eight"]) == 16
    np.testing.assert_allclose(loss["elastic"], loss["eight"], rtol=1e-4)
    final = [restore_workdir(str(tmp_path / name), "latest") for name in ("eight", "elastic")]
    for a, b in zip(*(jax.tree.leaves(restored.state.params) for restored in final), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
