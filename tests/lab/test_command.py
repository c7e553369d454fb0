"""`python -m hga_flax study` as it is called."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hga_flax.__main__ import main
from hga_flax.data import pipeline
from hga_flax.errors import Interrupted, UserError
from hga_flax.lab import command, hardware, plan, worker
from hga_flax.lab.runs import all_runs
from hga_flax.lab.study import load_study
from tests.commands import ROOT, environment
from tests.lab.made_up import TINY, write_result, write_study

SCALES = {"small": [], "large": ["model.options=features=8"]}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in hardware.POOL_VARIABLES:  # which the command sets, and the test's end resets
        monkeypatch.setenv(name, "2")


def test_bad_arguments_are_one_line(tmp_path):
    file = write_study(tmp_path)
    for arguments, message in (
        (["study", file, "--workers=0"], "--workers=0"),
        (["study", file, "--minutes=0"], "--minutes=0"),
        (["study", str(tmp_path / "absent.py")], "no such file"),
        (["study", write_study(tmp_path, "bad", baseline="x")], "there is no row 'x'"),
        (["study", file, "--config.seed=3"], "use the study's key 'seeds'"),
        (["study", file, "--config.model.nmae=x"], "no such key; did you mean 'model.name'"),
        (["study", file, "--scale=gpu"], "has no scales"),
        (["study", file, f"--dir={tmp_path}/a[1]"], r"checkpoints may be lost below a path with \["),
        (["study", write_study(tmp_path, "two", scales=SCALES), "--scale=larg"], "did you mean 'large'"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)


@pytest.mark.medium
def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "step_seconds", lambda experiment, flops: 1.0)  # a measurement of this machine
    file = write_study(tmp_path, rows={"none": [], "se": ["model.attention=se"]})
    assert main(["study", file, f"--dir={tmp_path / 'runs'}", "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # 2 steps of a second and 3 batches of a third to evaluate, 3 seeds of 2 rows.
    assert "6: 0 done, 6 to do" in printed and "about 0:18 for one worker" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("left", [0, 1])
def test_a_killed_worker_is_no_failure_if_others_finish_its_runs(tmp_path, monkeypatch, left):
    file = write_study(tmp_path, directory=str(tmp_path / "runs"))

    def start_workers(arguments):
        runs = all_runs(load_study(file, check=False))
        for run in runs[left:]:
            write_result(run.workdir, 5.0)
        return 1

    monkeypatch.setattr(command, "start_workers", start_workers)
    assert main(["study", file, "--workers=2"]) == left


def test_it_checks_works_and_says_how_to_report(tmp_path, capsys, monkeypatch):
    file, asked = write_study(tmp_path, budget_minutes=7), []
    monkeypatch.setattr(worker, "work", lambda study, say, minutes: asked.append(minutes) or 0)
    assert main(["study", file, f"--dir={tmp_path}"]) == 0
    assert main(["study", file, f"--dir={tmp_path}", "--minutes=3"]) == 0
    assert asked == [7.0, 3.0]
    assert f"python -m hga_flax report {file} --dir={tmp_path}" in capsys.readouterr().out
    monkeypatch.setattr(worker, "work", lambda study, say, minutes: 2)
    assert main(["study", file, f"--dir={tmp_path}"]) == 1


def test_workers_and_the_report_are_given_the_scale_and_the_overrides(tmp_path, capsys, monkeypatch):
    file, asked = write_study(tmp_path, scales=SCALES), []
    flags = ["--scale=large", f"--dir={tmp_path / 'runs'}", "--config.optimizer.momentum=0.5"]
    monkeypatch.setattr(worker, "work", lambda study, say, minutes: asked.append(study) or 0)
    assert main(["study", file, *flags]) == 0
    (study,) = asked
    assert study.name == "made_up_large" and study.directory == tmp_path / "runs"
    assert {(r.config.model.options, r.config.optimizer.momentum) for r in study.rows.values()} == {("features=8", 0.5)}
    assert f"python -m hga_flax report {file} {' '.join(flags)}" in capsys.readouterr().out
    started = []
    monkeypatch.setattr(command.subprocess, "Popen", lambda line, **_: started.append(line) or Finished())
    command.start_workers(argparse.Namespace(file=file, scale="large", dir="there", minutes=None, workers=2,
                                             overrides=flags[2:], threads=None, devices=None))  # fmt: skip
    assert all(line[4:8] == [file, "--scale=large", "--dir=there", flags[2]] for line in started) and len(started) == 2


class Finished:
    """A worker that is over."""

    returncode = 0

    def poll(self):
        return 0


@pytest.mark.medium
def test_a_killed_worker_is_said_when_it_happens(tmp_path, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(command, "say", lambda line: said.append((line, time.monotonic())))
    popen, ends = subprocess.Popen, iter(("import os; os.kill(os.getpid(), 9)", "import time; time.sleep(2)"))
    monkeypatch.setattr(subprocess, "Popen", lambda line, **how: popen([sys.executable, "-c", next(ends)], **how))
    arguments = argparse.Namespace(
        file="x.py", dir=None, minutes=None, workers=2, threads=None, devices=None, scale=None, overrides=[]
    )
    assert command.start_workers(arguments) == 1
    ((line, when),) = said
    assert "killed by SIGKILL" in line and "the other one will take its run over" in line
    assert time.monotonic() - when > 0.5  # long before the end


def test_a_signal_while_the_workers_start_reaches_all_that_did(monkeypatch):
    real, made = subprocess.Popen, []

    def start(line, **options):
        made.append(real(["sleep", "60"], **options))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    monkeypatch.setattr(command.subprocess, "Popen", start)
    arguments = argparse.Namespace(
        file="x.py", dir=None, minutes=None, workers=3, threads=None, devices=None, scale=None, overrides=[]
    )
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        command.start_workers(arguments)
    assert [worker.returncode for worker in made] == [-signal.SIGTERM] * 2  # and the third was not started


@pytest.mark.medium
def test_rows_are_checked_on_the_devices_of_their_runs(tmp_path, monkeypatch):
    """15 images do not divide over the devices of this machine, but over the one of each run."""
    rows = {"b16": ["training.batch_size=16"], "b15": ["training.batch_size=15"]}
    overrides = [item for item in TINY if "batch_size" not in item]
    file = write_study(tmp_path, overrides=overrides, rows=rows, baseline="b16")
    code = "import sys, hga_flax.lab.command as c; c.start_workers = lambda a: 0; from hga_flax.__main__ import main; "
    line = [
        sys.executable,
        "-c",
        code + "main(sys.argv[1:])",
        "study",
        file,
        f"--dir={tmp_path / 'runs'}",
        "--workers=2",
    ]
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(line, cwd=ROOT, env=own, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_more_workers_are_advised_where_cores_are_idle(monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: [])
    monkeypatch.setattr(pipeline, "available_cores", lambda: 8)
    study = argparse.Namespace(threads=2, devices=0)
    assert command.more_workers(study, 1) == "--workers=4 would use all cores of this machine"
    assert command.more_workers(study, 4) is None and command.more_workers(study, 9) is None
    monkeypatch.setattr(hardware, "gpus", lambda: ["0", "1"])
    study = argparse.Namespace(threads=1, devices=1)
    assert command.more_workers(study, 1) == "--workers=2 would use all GPUs of this machine"


def made_steps(run):
    file = run.workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on_and_ends_as_undisturbed_runs_do(tmp_path):
    """Real training: one of two workers is killed, then the command is stopped, then it ends."""
    from hga_flax.bench.soak import compare

    overrides = [*TINY[:-1], "training.steps=60", "training.log_every_steps=5", "checkpoint.every_steps=10"]
    rows = {"none": ["model.attention=none"], "se": ["model.attention=se"]}
    file = write_study(tmp_path, overrides=overrides, rows=rows, seeds=2, directory=str(tmp_path / "runs"))
    study = load_study(file)
    runs = all_runs(study)
    line = [sys.executable, "-m", "hga_flax", "study", file, "--workers=2"]

    def start():
        return subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)

    def wait_for(condition):
        deadline = time.monotonic() + 500
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    first = start()
    wait_for(lambda: 20 in made_steps(runs[0]))
    owner = json.loads((study.directory / "claims" / "none.seed_0.0").read_text())["pid"]
    os.kill(owner, signal.SIGKILL)
    wait_for(lambda: any(10 in made_steps(run) for run in runs[2:]))
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=200)
    assert first.returncode == 143, output
    assert not all(run.is_over for run in runs)

    last = start()
    output, _ = last.communicate(timeout=1000)
    assert last.returncode == 0, output
    assert all(run.result()["step"] == 60 for run in runs)
    assert runs[0].result()["sessions"] >= 2
    whole = tmp_path / "whole"
    command_line = [sys.executable, *runs[0].command.split()[1:-1], f"--workdir={whole}"]
    assert runs[0].command.startswith("python train.py")  # this study is not settled: nothing is known of threads
    printed = (runs[0].workdir / "command.txt").read_text()
    assert printed.startswith("JAX_NUM_CPU_DEVICES=1 NPROC=1 python train.py")
    others = {name: value for name, value in environment().items() if name != "XLA_FLAGS"}  # which forces the devices
    own = dict(part.split("=") for part in printed.split(" python ")[0].split())
    subprocess.run(command_line, cwd=ROOT, env=others | own, check=True, stdout=subprocess.DEVNULL)
    assert compare(runs[0].workdir, whole) == []
