import argparse
import re
import signal
import socket
import time

import cv2
import jax
import numpy as np
import pytest

from hga_flax.errors import Interrupted, UserError
from hga_flax.processes import coordination, distributed
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.manifest import find_damage
from hga_flax.training.restore import restore_workdir
from hga_flax.training.trainer import train
from hga_flax.version import version_of_code
from tests import commands
from tests.test_train import ONE_BLOCK, TINY, rows
from tests.training import tiny
from tests.training.processes import LOST_SECONDS, STEPS, finish, free_address, start, start_pair, start_processes

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
        ({"coordinator": "a:1"}, "--coordinator: also needs --num-processes and --process-id"),
        ({"process_id": 0, "num_processes": 2}, "--num-processes: also needs --coordinator"),
        ({"coordinator": "a", "process_id": 0, "num_processes": 2}, "--coordinator=a: write HOST:PORT"),
        ({"coordinator": "a:99999", "process_id": 0, "num_processes": 2}, "write HOST:PORT"),
        ({"coordinator": "a:1", "process_id": 0, "num_processes": 0}, "--num-processes=0: must be at least 1"),
        ({"coordinator": "a:1", "process_id": 2, "num_processes": 2}, "--process-id=2: must be 0 to 1"),
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


def test_what_a_machine_has_of_its_own_is_not_compared(monkeypatch):
    compared = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: None)
    monkeypatch.setattr(jax.config, "update", lambda *option: None)
    monkeypatch.setattr(distributed, "check_alike", compared.update)
    given = arguments(coordinator="a:1", num_processes=2, process_id=0)
    given.workdir, given.data_dir, given.json, given.profile, given.split = "run", "data", True, 3, "val"
    distributed.start(given, tiny.config(seed=7))
    own = {"--workdir", "--data-dir", "--json", "--profile", "--process-id", "--config.data.dir"}
    own |= {"--config.data.num_workers", "--config.training.compilation_cache"}
    assert own.isdisjoint(compared)
    assert compared["--split"] == "val" and compared["--config.seed"] == 7
    assert compared["jax"] == jax.__version__ and compared["hga_flax"] == version_of_code()
    assert {"Python", "optax", "numpy", "the number of processes"} <= compared.keys()
    assert compared["numpy"] == np.__version__ and distributed._installed("no-such-library") == "not installed"
    assert compared["JAX_DEFAULT_PRNG_IMPL"] == "threefry2x32" and compared["JAX_ENABLE_X64"] is False


def test_a_port_that_is_in_use_is_one_line():
    """JAX's process 0 would crash, or answer the processes of another run."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--coordinator={address}: port \d+ of this host cannot .*another"):
            distributed.start(arguments(coordinator=address, num_processes=2, process_id=0), tiny.config())


@pytest.fixture
def one_of_several(monkeypatch):
    """This process passes for one of several; the list says what it has done at its end."""
    done, clients = [], [object()]
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(clients))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("shutdown") or clients.clear())
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: done.append("waited"))
    return done


def test_what_is_done_together_is_configured_and_ends_with_the_others(one_of_several):
    assert distributed.together(tiny.config(), lambda: one_of_several.append("work") or "result") == "result"
    assert one_of_several == ["work", "shutdown"]


def test_work_that_fails_does_not_wait_for_the_others(one_of_several):
    with pytest.raises(UserError, match=r"training.log_every_steps=0"):
        distributed.together(tiny.config(training__log_every_steps=0), lambda: one_of_several.append("work"))
    with pytest.raises(ZeroDivisionError):
        distributed.together(tiny.config(), lambda: 1 / 0)
    assert one_of_several == ["waited"]  # process 0, for those that fail alike


@pytest.mark.parametrize(("alone", "end"), [(False, ["shutdown"]), (True, ["waited"])])
def test_a_signal_ends_all_together_once_they_have_a_step_to_save(one_of_several, alone, end):
    def work():
        raise Interrupted("stopped by SIGTERM", 143, alone=alone)

    with pytest.raises(Interrupted):
        distributed.together(tiny.config(), work)
    assert one_of_several == end


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: [pair.cc:534] Connection closed by peer"),
            True,
        ),
        (
            jax.errors.JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)"),
            True,
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes"), False),
        (ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:139"), True),
        (ValueError("a barrier"), False),
    ],
)
def test_what_jax_says_of_a_lost_process_becomes_one_line(one_of_several, error, lost):
    def work():
        try:
            raise error
        except Exception as cause:
            raise UserError("the checkpoint of step 3 cannot be written") from cause

    with pytest.raises(UserError) as raised:
        distributed.together(tiny.config(), work)
    assert isinstance(raised.value, coordination.ProcessLost) == lost
    if lost:
        assert re.fullmatch(
            r"another process was lost or failed \(.*\); .*; start all .* the same command", str(raised.value)
        )


def test_alone_the_union_is_the_own_indices():
    assert distributed.union([5, 1, 3], limit=10) == [1, 3, 5]


RUN = (*TINY, *ONE_BLOCK, "--config.optimizer.learning_rate=0.01", "--config.training.log_every_steps=2")


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


ALONE = """
import argparse, sys
from configs.digits import get_config
from hga_flax.errors import run_main
from hga_flax.processes import distributed
distributed.START_TIMEOUT_SECONDS = int(sys.argv[1])
given = argparse.Namespace(coordinator=sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
run_main(lambda: distributed.start(given, get_config()))
"""


@pytest.mark.medium
@pytest.mark.parametrize("process", [0, 1])  # which waits for the other, or was given a wrong address
def test_a_process_does_not_wait_for_the_others_for_ever_and_ctrl_c_ends_it(process):
    address = free_address()
    waits = start("-c", ALONE, 2, address, process)
    stopped = start("-c", ALONE, 1000, free_address(), process)
    (told,) = finish([waits], 100)
    assert told.code == 1
    assert told.lines == [
        f"error: the processes (--coordinator={address} --num-processes=2 --process-id={process}) cannot be connected: "
        "not all of them came within 2 s; is each started, with its own process id, and can it reach the port of "
        "process 0?"
    ]
    stopped.send_signal(signal.SIGINT)  # by now it waits in JAX, as the first one did
    (told,) = finish([stopped], 30)
    assert told.code in (-signal.SIGINT, 130) and "Traceback" not in told.errors


def told_of_a_loss(end):
    """Whether a process ended because another was lost: with our line, or by JAX's abort, which says the same."""
    line = "error: another process was lost or failed ("
    return (end.code == 1 and any(text.startswith(line) for text in end.lines)) or (
        end.code == -signal.SIGABRT and "JAX distributed service detected fatal errors" in end.errors
    )


def seconds_since(ends):
    """Returns how long ago the fault was."""
    (then,) = [float(line.split()[1]) for end in ends for line in end.output.splitlines() if line.startswith("now: ")]
    return time.time() - then


def end_with(fault, of, at, *options):
    """Returns how two processes ended, one of which something befalls; the other may not take much longer."""
    ends = finish(start_pair(f"--fault={fault}", f"--of={of}", f"--at={at}", *options))
    assert seconds_since(ends) < LOST_SECONDS + coordination.LAST_SECONDS + MACHINE_SECONDS
    assert told_of_a_loss(ends[1 - of]), ends[1 - of].errors
    assert not any("done" in end.output for end in ends)
    return ends


MACHINE_SECONDS = 30  # of a machine that does much else


@pytest.mark.slow
@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("at", [0, 3])
def test_a_killed_process_ends_the_other(of, at):
    """Before the first step it waits at a barrier, later in a collective."""
    assert end_with("kill", of, at)[of].code == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("of", [0, 1])
def test_a_process_that_fails_ends_with_its_line_and_ends_the_other(of):
    failed = end_with("error", of, 3)[of]
    assert failed.code == 1 and "error: the disk is full" in failed.lines and "Traceback" not in failed.errors


@pytest.mark.medium
def test_processes_of_other_configurations_do_not_train_together(tmp_path):
    rates = ("0.1", "0.9")
    address = free_address()
    processes = [
        start(
            *TINY, f"--workdir={tmp_path}", f"--config.optimizer.learning_rate={rate}",
            f"--coordinator={address}", "--num_processes=2", f"--process_id={number}",
        )
        for number, rate in enumerate(rates)
    ]  # fmt: skip
    for end in finish(processes, 120):
        assert end.code == 1 and end.lines[-1] == (
            "error: the processes of a run need the same command, data and versions: --config.optimizer.learning_rate "
            "is 0.9 in process 1, and 0.1 in process 0"
        )
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            (*TINY, "--config.model.options=features=4", "--config.init.weights=run", "--workdir={}"),
            "what init.weights loads is",
        ),
        (("evaluate.py", "--workdir={}", "--data-dir=data"), "the number of examples in 'val' is"),
        (("evaluate.py", "--weights=run", "--config.seed=1"), "what is evaluated is"),
    ],
)  # fmt: skip
def test_processes_that_find_other_files_at_a_path_are_refused(command, message, tmp_path):
    for seed in (1, 2):
        train(tiny.config(seed=seed, training__steps=1), str(tmp_path / str(seed) / "run"))
        for number in range(10 + seed):
            folder = tmp_path / str(seed) / "data" / "val" / str(number % 10)
            folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f"{number}.png"), np.full((8, 8), number, np.uint8))
    shared = tmp_path / "shared"
    if "--data-dir=data" in command:
        folder_run = {"data__name": "folder", "data__fake": False, "data__dir": str(tmp_path / "1" / "data")}
        splits = {"data__train_split": "val", "data__eval_split": "val"}
        train(tiny.config(**folder_run | splits, training__steps=1, training__batch_size=8), str(shared))
    script, *flags = (part.format(shared).replace("=configs/", f"={commands.ROOT}/configs/") for part in command)
    address = free_address()
    processes = [
        start(
            commands.ROOT / script, *flags,
            f"--coordinator={address}", "--num_processes=2", f"--process_id={seed - 1}", folder=tmp_path / str(seed),
        )
        for seed in (1, 2)
    ]  # fmt: skip
    for end in finish(processes, 120):
        assert end.code == 1 and f"the same command, data and versions: {message}" in end.lines[-1], end.errors


@pytest.mark.slow
def test_processes_with_other_initial_states_are_refused(tmp_path):
    ends = finish(start_pair("--fault=seed", "--of=1", "--at=0", f"--workdir={tmp_path}"))
    for end in ends:
        assert end.code == 1 and "the state to start from is arrays with checksum" in end.lines[-1], end.errors
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_bug_keeps_its_traceback():
    failed = end_with("bug", 1, 3)[1]
    assert failed.code == 1 and "ZeroDivisionError" in failed.lines and "Traceback" in failed.errors


@pytest.mark.medium
@pytest.mark.parametrize("of", [0, 1])
def test_a_signal_to_one_process_before_the_first_step_ends_the_other(of):
    """It would wait for an hour."""
    stopped = end_with("term", of, 0)[of]
    assert stopped.code == 143 and "Traceback" not in stopped.errors
    assert "stopped by SIGTERM; nothing new to save, and the same command resumes" in stopped.lines


def check_whole_and_resume(workdir, at_least):
    """The newest checkpoint is whole, and the same command resumes from it to the end."""
    newest = Checkpoints(workdir, read_only=True).steps()[-1]
    assert newest >= at_least and not find_damage(workdir / "checkpoints" / str(newest), newest)
    ends = finish(start_pair(f"--workdir={workdir}"))
    assert [end.code for end in ends] == [0, 0], ends[0].errors + ends[1].errors
    assert f"resuming {workdir} at step {newest}" in ends[0].output and "finished" in ends[0].output
    assert restore_workdir(str(workdir), "latest").step == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "of", "code"), [("kill", 0, -signal.SIGKILL), ("kill", 1, -signal.SIGKILL), ("error", 1, 1)]
)
def test_a_training_that_loses_a_process_goes_on_from_a_whole_checkpoint(fault, of, code, tmp_path):
    ends = end_with(fault, of, 7, f"--workdir={tmp_path}")
    assert ends[of].code == code
    check_whole_and_resume(tmp_path, at_least=4)  # that of step 6 may not be complete


@pytest.mark.slow
@pytest.mark.parametrize("of", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step_which_is_saved(of, tmp_path):
    ends = finish(start_pair("--fault=term", f"--of={of}", "--at=5", f"--workdir={tmp_path}"))
    assert seconds_since(ends) < LOST_SECONDS + MACHINE_SECONDS
    assert [end.code for end in ends] == [143, 143], ends[0].errors + ends[1].errors
    (line,) = {end.lines[-1] for end in ends}
    step = int(re.fullmatch(r"stopped by SIGTERM after step (\d+), which is saved; the same command resumes", line)[1])
    assert 5 <= step < STEPS
    check_whole_and_resume(tmp_path, at_least=step)
