import argparse
import re
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.training import distributed
from hga_flax.training.restore import restore_workdir
from tests import commands
from tests.test_train import TINY, rows
from tests.training import tiny

FLAGS = ("coordinator", "num_processes", "process_id")


def arguments(**given):
    return argparse.Namespace(**{flag: given.get(flag) for flag in FLAGS})


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, which is one process
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "TPU"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_launchers_are_told_apart(environment, name):
    assert distributed.launcher(environment) == name


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.setattr(distributed, "launcher", lambda: None)
    distributed.start(arguments(), tiny.config())
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator: also needs --num_processes and --process_id"),
        ({"process_id": 0, "num_processes": 2}, "--num_processes: also needs --coordinator"),
        ({"coordinator": "a", "process_id": 0, "num_processes": 2}, "--coordinator=a: write HOST:PORT"),
        ({"coordinator": "a:99999", "process_id": 0, "num_processes": 2}, "write HOST:PORT"),
        ({"coordinator": "a:1", "process_id": 0, "num_processes": 0}, "--num_processes=0: must be at least 1"),
        ({"coordinator": "a:1", "process_id": 2, "num_processes": 2}, "--process_id=2: must be 0 to 1"),
    ],
)
def test_wrong_flags_are_named(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        distributed.start(arguments(**given), tiny.config())


def test_a_launcher_that_cannot_be_used_says_what_to_do_instead(monkeypatch):
    def fail(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed, "launcher", lambda: "SLURM")
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(jax.config, "update", lambda *option: None)
    with pytest.raises(
        UserError, match=r"\(found by SLURM\) cannot be connected: coordinator_address .* or give --coo"
    ):
        distributed.start(arguments(), tiny.config())


def test_what_is_done_together_is_configured_and_watched(monkeypatch):
    done = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert distributed.together(tiny.config(), lambda: done.append(1) or "result") == "result" and done == [1]
    with pytest.raises(UserError, match=r"training.log_every_steps=0"):
        distributed.together(tiny.config(training__log_every_steps=0), lambda: done.append(2))
    assert done == [1]


def test_alone_the_union_is_the_own_indices():
    assert distributed.union([5, 1, 3], limit=10) == [1, 3, 5]


ALONE = """
import argparse, sys
from configs.digits import get_config
from hga_flax.errors import run_main
from hga_flax.training import distributed
distributed.START_TIMEOUT_SECONDS = int(sys.argv[1])
given = argparse.Namespace(coordinator=sys.argv[2], num_processes=2, process_id=0)
print("ready", flush=True)
run_main(lambda: distributed.start(given, get_config()))
"""


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_process_0_does_not_wait_for_the_others_for_ever_and_ctrl_c_ends_it():
    started = [
        subprocess.Popen(
            commands.command("-c", ALONE, seconds, free_address()), cwd=commands.ROOT, text=True,
            env=commands.environment() | {"PYTHONPATH": str(commands.ROOT)}, stdout=-1, stderr=-1,
        )
        for seconds in (2, 100)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "ready\n"
    error = started[0].communicate(timeout=60)[1]
    assert started[0].returncode == 1 and "Aborted" not in error and "stack trace" not in error
    (line,) = [line for line in error.splitlines() if not line.startswith("W")]
    assert line == (
        "error: the processes (found by flags) cannot be connected: not all have come within 2 s; is every one started?"
    )
    started[1].send_signal(signal.SIGINT)
    assert "Traceback" not in started[1].communicate(timeout=10)[1] and started[1].returncode == -signal.SIGINT


def start_processes(*options, count=2, devices=8):
    """Returns processes that share the devices of one run."""
    address = free_address()
    return [
        subprocess.Popen(
            commands.command(*options, f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"),
            cwd=commands.ROOT,
            env=commands.environment(devices // count),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def wait_for_rows(workdir, count, processes):
    """Waits until a run has logged so many lines."""
    deadline = time.monotonic() + 400
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < count:
        ended = [process.communicate()[1] for process in processes if process.poll() is not None]
        assert time.monotonic() < deadline and not ended, ended
        time.sleep(0.1)


RUN = (*TINY, "--config.optimizer.learning_rate=0.01", "--config.training.log_every_steps=2")


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    options = (*RUN, "--config.training.steps=12", "--config.checkpoint.every_steps=5")
    assert commands.run(*options, f"--workdir={tmp_path / 'one'}", devices=8).returncode == 0
    outputs = []
    for process in start_processes(*options, f"--workdir={tmp_path / 'two'}"):
        outputs.append(process.communicate(timeout=500))
        assert process.returncode == 0, outputs[-1][1]
    assert "8 x cpu (cpu), 2 process(es), 4 images each" in outputs[0][0]
    assert "finished" in outputs[0][0] and "model " not in outputs[1][0]  # process 0 alone tells and writes
    one, two = (restore_workdir(str(tmp_path / name), "latest") for name in ("one", "two"))
    assert one.step == two.step == 12
    for tree in ("params", "batch_stats"):
        pairs = zip(jax.tree.leaves(getattr(one.state, tree)), jax.tree.leaves(getattr(two.state, tree)), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    evaluations = []
    for process in start_processes("evaluate.py", f"--workdir={tmp_path / 'two'}", "--json"):
        evaluations.append(process.communicate(timeout=500))
        assert process.returncode == 0, evaluations[-1][1]
    assert '"num_examples": 297' in evaluations[0][0] and '"num_examples"' not in evaluations[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_resumes(stopped, tmp_path):
    options = (*RUN, "--config.training.steps=100000", f"--workdir={tmp_path}")
    processes = start_processes(*options)
    wait_for_rows(tmp_path, 3, processes)
    processes[stopped].terminate()
    for process in processes:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 143, stderr
        assert "stopped by SIGTERM after step" in stderr
    steps = rows(tmp_path)[-1]["step"]
    restored = restore_workdir(str(tmp_path), "latest")
    assert restored.step >= steps
    again = commands.run(*options, f"--config.training.steps={restored.step + 1}", devices=8)
    assert again.returncode == 0 and f"resuming {tmp_path} at step {restored.step}" in again.stdout, again.stderr


BEFORE_THE_FIRST_STEP = """
import argparse, os, signal, sys, threading, time
from configs.digits import get_config
from hga_flax.errors import run_main
from hga_flax.training import distributed
from hga_flax.training.preemption import Preemption
process = int(sys.argv[2])
def work():
    with Preemption(25.0):
        if process == int(sys.argv[3]):  # compiles, while the other waits for it
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(100)
        distributed.meet("the training step is compiled")
def main():
    config = get_config()
    distributed.start(argparse.Namespace(coordinator=sys.argv[1], num_processes=2, process_id=process), config)
    distributed.together(config, work)
run_main(main)
"""


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_to_one_process_before_the_first_step_ends_the_other(stopped):
    """It would wait for an hour."""
    address = free_address()
    processes = [
        subprocess.Popen(
            commands.command("-c", BEFORE_THE_FIRST_STEP, address, number, stopped), cwd=commands.ROOT, text=True,
            env=commands.environment() | {"PYTHONPATH": str(commands.ROOT)}, stdout=-1, stderr=-1,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143 if number == stopped else 1 for number in (0, 1)]
    assert "stopped by SIGTERM; nothing new to save" in errors[stopped]
    line = f"error: process {stopped} on {socket.gethostname()} was stopped by SIGTERM; the checkpoints written before"
    assert line in errors[1 - stopped] and "Traceback" not in "".join(errors)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_with_a_clear_line(lost, tmp_path):
    processes = start_processes(
        *RUN, "--config.training.steps=100000", f"--workdir={tmp_path}", "--config.training.lost_process_seconds=10"
    )
    wait_for_rows(tmp_path, 3, processes)
    processes[lost].kill()
    start, other = time.monotonic(), processes[1 - lost]
    _, stderr = other.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert other.returncode == 1
    (line,) = [line for line in stderr.splitlines() if not line.startswith(("W", "I", "E"))]
    assert line.startswith(f"error: process {lost} was lost (its connection is closed); the checkpoints written before")
    processes[lost].communicate()


def test_a_coordinator_that_is_not_there_is_an_error(monkeypatch):
    address = free_address()
    monkeypatch.setattr(distributed, "START_TIMEOUT_SECONDS", 1)
    with pytest.raises(UserError, match=rf"--coordinator={address}: process 0 cannot be reached there within 1 s"):
        distributed.start(arguments(coordinator=address, num_processes=2, process_id=1), tiny.config())
