"""Workers: every run made exactly once, whoever is killed; training itself is stubbed but where it says so."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hga_flax.errors import Interrupted, TemporaryError, UserError
from hga_flax.lab import worker
from hga_flax.lab.runs import all_runs
from hga_flax.lab.study import load_study
from tests.commands import ROOT, environment
from tests.lab.made_up import write_result, write_study

# A worker whose training notes who made it, takes its time and leaves an evaluation.
STUB = """
import os, sys, time
from hga_flax.errors import run_main
from hga_flax.lab import worker
from hga_flax.lab.study import load_study
def train(run):
    with (run.workdir / "made").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[3]))
    (run.workdir / "metrics.jsonl").write_text('{"step": 2, "eval/top1_error": 10.0}')
    return 0
worker._train, worker.POLL_SECONDS = train, 0.05
run_main(lambda: worker.work(load_study(sys.argv[1], sys.argv[2], check=False), print))
"""


def start(file, directory, seconds):
    command = [sys.executable, "-c", STUB, file, str(directory), str(seconds)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def makers(study):
    """Process numbers by run, in the order in which they began it."""
    return {run.name: (run.workdir / "made").read_text().split() for run in all_runs(study)}


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return write_study(tmp_path, directory=str(tmp_path / "runs"))


@pytest.fixture
def study(file):
    return load_study(file, check=False)


def stub(monkeypatch, errors=None, signals=None):
    """Replaces training in this process; returns the names of the runs that were made."""
    made = []

    def train(run):
        made.append(run.name)
        if errors and run.name in errors:
            raise errors[run.name]
        (run.workdir / "metrics.jsonl").write_text(json.dumps({"step": 2, "eval/top1_error": 10.0 + run.seed}))
        return signals.get(run.name, 0) if signals else 0

    monkeypatch.setattr(worker, "_train", train)
    return made


@pytest.mark.medium
def test_two_workers_at_once_make_every_run_exactly_once(file, study, tmp_path):
    both = [start(file, tmp_path / "runs", 0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    made = makers(study)
    assert len(made) == 9 and all(len(by) == 1 for by in made.values())
    assert {by[0] for by in made.values()} == {str(process.pid) for process in both}
    assert all(run.result()["sessions"] == 1 for run in all_runs(study))
    assert sum(output.count("top-1 error") for output, _ in outputs) == 9


@pytest.mark.medium
def test_a_killed_worker_s_run_is_taken_over(file, study, tmp_path, monkeypatch):
    killed = start(file, tmp_path / "runs", 1000)
    begun = all_runs(study)[0]
    try:
        wait_for((begun.workdir / "made").exists)
        waiting = start(file, tmp_path / "runs", 0)
        wait_for(lambda: sum(run.is_over for run in all_runs(study)) == 8)  # all but the one that is held
        time.sleep(0.2)
        assert waiting.poll() is None and not begun.is_over
    finally:
        killed.kill()
        killed.wait()
    _, error = waiting.communicate(timeout=100)
    assert waiting.returncode == 0, error
    assert makers(study)[begun.name] == [str(killed.pid), str(waiting.pid)]
    assert begun.result()["sessions"] == 2
    assert [run.result()["sessions"] for run in all_runs(study)[1:]] == [1] * 8


@pytest.mark.medium
def test_sigterm_gives_the_run_up_at_once(file, study, tmp_path):
    process = start(file, tmp_path / "runs", 1000)
    wait_for((all_runs(study)[0].workdir / "made").exists)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "resumes" in error and error.count("\n") == 1
    claim = study.directory / "claims" / "none.seed_0.0"
    assert json.loads(claim.read_text())["released"] is True
    again = start(file, tmp_path / "runs", 0)  # a process of its own: it has the devices of the first one
    _, error = again.communicate(timeout=60)
    assert again.returncode == 0, error
    assert sum(run.is_over for run in all_runs(study)) == 9


def test_what_is_made_is_left_alone(study, monkeypatch):
    write_result(study.directory / "se" / "seed_2", 1.0)
    made = stub(monkeypatch)
    said = []
    assert worker.work(study, said.append) == 0
    assert len(made) == 8 and "se.seed_2" not in made
    assert worker.work(study, said.append) == 0 and len(made) == 8
    assert all_runs(study)[7].name == "se.seed_2" and all_runs(study)[7].result()["top1_error"] == 1.0
    result = all_runs(study)[3].result()
    assert result["top1_error"] == 11.0 and result["jax"] and "CPU thread" in result["device"]
    assert said[-1].startswith("hga seed 2") and "9 of 9 runs" in said[-1]


def test_a_run_that_fails_is_written_down_and_made_again_on_request(study, monkeypatch):
    errors = {"se.seed_0": UserError("the loss\nis not finite")}
    made, said = stub(monkeypatch, errors), []
    assert worker.work(study, said.append) == 1
    assert len(made) == 9 and all_runs(study)[1].failure() == "the loss is not finite"
    assert any("failed: the loss is not finite" in line for line in said)
    assert worker.work(study, said.append) == 1 and len(made) == 9
    errors.clear()
    worker.clear_failures(study)
    assert worker.work(study, said.append) == 0 and made[9:] == ["se.seed_0"]


def test_a_run_with_something_in_its_way_is_put_off_and_not_failed(study, monkeypatch):
    def run_out():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            wrapped = UserError("the checkpoint cannot be written")
            wrapped.__cause__ = error
            return wrapped

    errors = {"none.seed_0": TemporaryError("another command trains there"), "se.seed_0": run_out()}
    made, said = stub(monkeypatch, errors), []
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    assert worker.work(study, said.append) == 2
    assert {run.name for run in all_runs(study) if not run.is_over} == set(errors)
    assert made.count("none.seed_0") == 2 and made[-2:] == list(errors)  # again at the end
    assert said[-1] == "put off, until the same command tries again: none.seed_0, se.seed_0"
    errors.clear()
    assert worker.work(study, said.append) == 0 and all(run.is_over for run in all_runs(study))


def test_what_no_user_can_mend_does_not_end_the_study(study, monkeypatch):
    made = stub(monkeypatch, {"se.seed_0": RuntimeError("RESOURCE_EXHAUSTED: out of memory")})
    assert worker.work(study, lambda line: None) == 1 and len(made) == 9
    run = all_runs(study)[1]
    assert run.failure() == f"RuntimeError: RESOURCE_EXHAUSTED: out of memory; see {run.workdir / 'log.txt'}"
    assert "Traceback" in (run.workdir / "log.txt").read_text()


@pytest.mark.medium
def test_a_diverged_run_names_its_own_command_not_the_studys(study, monkeypatch):
    from hga_flax.training import divergence, trainer

    run, before = all_runs(study)[1], list(sys.argv)
    run.workdir.mkdir(parents=True)
    monkeypatch.setattr(trainer, "train", lambda *_: divergence.command_line())
    assert worker._train(run) == run.command and sys.argv == before


def test_an_interrupted_run_keeps_its_place(study, monkeypatch):
    made = stub(monkeypatch, {"se.seed_0": Interrupted("stopped by SIGINT", 130)})
    with pytest.raises(Interrupted):
        worker.work(study, lambda line: None)
    assert made == ["none.seed_0", "se.seed_0"]
    made = stub(monkeypatch)
    worker.work(study, lambda line: None)
    assert made[0] == "se.seed_0" and len(made) == 8


def test_a_signal_after_the_last_step_ends_the_worker_after_the_run(study, monkeypatch):
    made = stub(monkeypatch, signals={"se.seed_0": signal.SIGTERM})
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        worker.work(study, lambda line: None)
    assert caught.value.code == 143 and made == ["none.seed_0", "se.seed_0"]
    assert all_runs(study)[1].result() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_between_two_runs_is_not_lost_in_a_callback(study, monkeypatch):
    """As in a finalizer, whose exceptions Python prints and drops."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    made = stub(monkeypatch)
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: None)

    def say(line):
        if "of 9 runs" in line and len(made) == 2:
            Finalized()

    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        worker.work(study, say)
    assert len(made) == 2 and all_runs(study)[1].result()


def test_no_run_is_begun_that_would_end_after_the_budget(study, monkeypatch):
    for row, seconds in (("none", 100.0), ("se", 900.0)):
        write_result(study.directory / row / "seed_0", 1.0, seconds=seconds)
    made, said = stub(monkeypatch), []
    worker.work(study, said.append, budget_minutes=10.0)
    # Its own row's time, or the mean of all: of what is made here a run takes no time at all.
    assert "none.seed_1" in made and "se.seed_1" not in made and "hga.seed_0" in made
    assert said[-1] == "the budget of 10 minutes leaves 2 runs for later"


def test_the_last_session_of_a_resumed_run_is_not_its_time(study):
    runs = all_runs(study)
    write_result(study.directory / "none" / "seed_0", 1.0, seconds=4.0, sessions=3)
    assert worker.expected_seconds(runs)(runs[3]) == 4.0  # at least
    write_result(study.directory / "none" / "seed_1", 1.0, seconds=900.0, sessions=1)
    assert worker.expected_seconds(runs)(runs[6]) == 900.0


@pytest.mark.parametrize("fails", [False, True])
def test_who_lost_its_run_leaves_without_a_result_or_a_failure(study, monkeypatch, fails):
    left = []

    def leave():
        left.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_leave", leave)
    stub(monkeypatch)
    taken_over = study.directory / "claims" / "none.seed_0.1"
    train = worker._train

    def late(run):
        taken_over.write_text("{}")
        if fails:
            raise OSError("the other worker's checkpoint is in the way")
        return train(run)

    monkeypatch.setattr(worker, "_train", late)
    with pytest.raises(KeyboardInterrupt):
        worker.work(study, lambda line: None)
    run = all_runs(study)[0]
    assert left and run.result() is None and run.failure() is None


def test_a_worker_does_not_outlive_who_started_it(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: sent.append((pid, signum)))

    class Held:
        is_lost = False

    worker._check(Held, os.getppid())
    assert sent == []
    worker._check(Held, os.getppid() + 1)
    assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.medium
def test_a_run_is_an_ordinary_workdir(tmp_path, monkeypatch):
    """With real training."""
    monkeypatch.chdir(ROOT)
    rows = {"none": ["model.attention=none", f"training.compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"]}
    file = write_study(tmp_path, rows=rows, seeds=[3], directory=str(tmp_path / "runs"))
    study = load_study(file)
    assert worker.work(study, lambda line: None) == 0
    (run,) = all_runs(study)
    result = run.result()
    assert result["step"] == 2 and result["num_examples"] == 48 and 0 <= result["top1_error"] <= 100
    assert json.loads((run.workdir / "config.json").read_text())["seed"] == 3
    assert (run.workdir / "checkpoints" / "2").is_dir()
    assert "evaluation on 48" in (run.workdir / "log.txt").read_text()
    from hga_flax.training.restore import evaluate_workdir

    again = evaluate_workdir(str(run.workdir), "latest", None, None, None)
    assert again["top1_error"] == pytest.approx(result["top1_error"], abs=1e-4)


def test_a_worker_waits_for_a_file_server(monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    answers = iter([OSError(116, "Stale file handle"), True])

    class Away:
        @property
        def is_over(self):
            if isinstance(answer := next(answers), OSError):
                raise answer
            return answer

    assert worker._pending([Away()]) == []
