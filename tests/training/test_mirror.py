import json
import pathlib
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from hga_flax import storage
from hga_flax.__main__ import main
from hga_flax.errors import UserError
from hga_flax.pictures.curves import read_run
from hga_flax.storage import Remote, Unreachable
from hga_flax.training import mirror as m
from hga_flax.training.dry_run import workdir_state
from hga_flax.training.initial_weights import read_source
from hga_flax.training.mirror import Mirror, run_folder
from hga_flax.training.prediction import Predictor
from hga_flax.training.restore import restore_workdir
from hga_flax.training.seal import find_damage, write_seal
from hga_flax.training.trainer import train
from hga_flax.training.twin import Overtaken, Twin
from tests import buckets, commands
from tests.test_train import TINY
from tests.training import tiny
from tests.training.test_distributed import start_processes

STATE, RUN = "state/d/x", "run/metadata"


@pytest.fixture
def remote(bucket, monkeypatch):
    monkeypatch.setattr(m, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(m, "PAUSES", (0.0, 0.0))
    return Remote(f"{bucket}/run", "--workdir")


@pytest.fixture
def mirror(remote):
    """A mirror whose thread does not run: the tests do its work."""
    mirror = Mirror(Twin(remote.address, "--workdir", trains=True))
    mirror.catch_up()
    return mirror


class Operations(list):
    """What was done to a bucket, one after the other; `after` is called after each."""

    after = staticmethod(lambda: None)


@pytest.fixture
def operations(remote, monkeypatch):
    done, lock = Operations(), threading.Lock()
    system = type(remote._fs())
    for name in ("pipe_file", "put_file", "cp_file", "rm_file"):
        work = getattr(system, name)

        def noted(self, *paths, name=name, work=work, **more):
            with lock:
                work(self, *paths, **more)
                there = str(paths[-1] if name in ("cp_file", "put_file") else paths[0])
                done.append((name, there.removeprefix("bucket/run/")))
                done.after()

        monkeypatch.setattr(system, name, noted)
    return done


def make(mirror, step, content=b"weights", folder="checkpoints"):
    """Makes a complete checkpoint in the twin, as Orbax does: in one move."""
    scratch = mirror._folder / folder / f"{step}.orbax-checkpoint-tmp"
    for name, text in {STATE: content, RUN: b"{}", "_CHECKPOINT_METADATA": b"{}"}.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(text)
    write_seal(scratch, step)
    scratch.rename(scratch.with_name(str(step)))


def steps(remote):
    """The complete checkpoints of the bucket."""
    return sorted(name.removesuffix("/seal.json") for name in remote.files() if name.endswith("/seal.json"))


def push(mirror):
    mirror._push_checkpoints()
    mirror._push_others()


def test_a_checkpoint_is_uploaded_its_seal_last_and_removed_its_seal_first(mirror, remote, operations):
    make(mirror, 1)
    (mirror._folder / "checkpoints/2.orbax-checkpoint-tmp").mkdir()  # not complete
    assert mirror._push_checkpoints() and not mirror._push_checkpoints()
    assert operations[-1] == ("pipe_file", "checkpoints/1/seal.json") and len(operations) == 4
    assert steps(remote) == ["checkpoints/1"]
    make(mirror, 2)
    shutil.rmtree(mirror._folder / "checkpoints/1")
    operations.clear()
    assert mirror._push_checkpoints()
    removed = [name for kind, name in operations if kind == "rm_file"]
    assert removed[0] == "checkpoints/1/seal.json" and operations[3] == ("pipe_file", "checkpoints/2/seal.json")
    assert remote.files().keys() == {f"checkpoints/2/{n}" for n in (STATE, RUN, "_CHECKPOINT_METADATA", "seal.json")}


def whole(remote, folder):
    """The checkpoints of the bucket that a run would take for whole now, as a fresh machine finds them."""
    shutil.rmtree(folder, ignore_errors=True)
    names = list(remote.files())
    remote.get(names, folder)
    found = [name.removesuffix("/seal.json") for name in names if name.endswith("/seal.json")]
    damaged = {name: damage for name in found if (damage := find_damage(folder / name, int(name.rpartition("/")[2])))}
    assert not damaged
    return sorted(found)


def test_a_step_that_is_saved_again_is_in_the_bucket_at_every_moment(mirror, remote, operations, tmp_path):
    make(mirror, 1)
    push(mirror)
    aside = mirror._folder / "superseded/1"
    aside.parent.mkdir()
    (mirror._folder / "checkpoints/1").rename(aside)
    push(mirror)
    assert steps(remote) == ["checkpoints/1"]  # its successor is being written here
    make(mirror, 1, b"weights again")
    shutil.rmtree(aside)
    moments = []
    operations.after = lambda: moments.append(tuple(whole(remote, tmp_path / "now")))
    push(mirror)
    assert all(moments) and len(moments) >= 12
    assert set(moments) == {("checkpoints/1",), ("checkpoints/1", "superseded/1"), ("superseded/1",)}
    assert moments[-1] == ("checkpoints/1",) and remote.read(f"checkpoints/1/{STATE}") == b"weights again"
    assert not any(name.startswith("superseded") for name in remote.files())


def test_a_kill_between_any_two_operations_leaves_a_step_that_a_fresh_machine_reads(remote, operations, tmp_path):
    """The bucket is taken at every moment of three uploads, the last of a step that is saved again."""
    mirror = Mirror(Twin(remote.address, "--workdir", trains=True))
    moments = []

    def look():
        found = whole(remote, tmp_path / "now")
        newest = json.loads((tmp_path / "now" / m.NEWEST).read_text())["step"] if m.NEWEST in remote.files() else 0
        assert newest == 0 or found, "a step is said to have been complete, and there is none"
        moments.append(max((int(name.rpartition("/")[2]) for name in found), default=0))

    operations.after = look
    for step in (1, 2, 2):
        shutil.rmtree(mirror._folder / f"checkpoints/{step}", ignore_errors=True)
        shutil.rmtree(mirror._folder / f"checkpoints/{step - 1}", ignore_errors=True)
        make(mirror, step, b"%d %d" % (step, len(moments)))
        (mirror._folder / m.NEWEST).write_text(json.dumps({"step": step}))
        push(mirror)
    assert moments == sorted(moments) and moments[-1] == 2


def test_what_an_upload_that_was_cut_short_left_is_removed_or_completed(mirror, remote):
    for name in (f"checkpoints/3/{STATE}", f"checkpoints/4/{STATE}", "checkpoints/4/other"):
        remote.write(name, b"part")
    mirror.catch_up()
    assert f"checkpoints/3/{STATE}" in remote.files()  # before the session begins nothing is removed
    make(mirror, 4)
    push(mirror)
    assert steps(remote) == ["checkpoints/4"] and {n.split("/")[1] for n in remote.files()} == {"4"}
    assert remote.read(f"checkpoints/4/{STATE}") == b"weights" and "checkpoints/4/other" not in remote.files()


def test_other_files_are_uploaded_whole_when_they_have_changed(mirror, remote, operations):
    files = {"metrics.jsonl": "1", "tensorboard/events": "1", "damaged/3/x": "1", ".hidden": "1", "a/.new": "1"}
    for name, text in files.items():
        (mirror._folder / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror._folder / name).write_text(text)
    push(mirror)
    assert remote.files().keys() == {"metrics.jsonl", "tensorboard/events", "damaged/3/x"}
    operations.clear()
    with (mirror._folder / "metrics.jsonl").open("a") as file:
        file.write("2")
    push(mirror)
    push(mirror)
    assert operations == [("pipe_file", "metrics.jsonl")] and remote.read("metrics.jsonl") == b"12"


def test_who_goes_on_from_a_step_has_every_line_up_to_it(mirror, remote, operations):
    lines = []  # that there were, whenever a step became complete
    seal = lambda: operations[-1][1].endswith("seal.json") and lines.append(remote.read("metrics.jsonl"))
    operations.after = seal
    for step in (1, 2):
        (mirror._folder / "metrics.jsonl").write_text("line\n" * step)
        make(mirror, step)
        mirror.finish()
    assert lines == [b"line\n", b"line\nline\n"]


def test_a_step_is_not_said_to_have_been_complete_before_it_is_there(mirror, remote):
    (mirror._folder / m.NEWEST).write_text('{"step": 1}')
    mirror._push_others()
    assert m.NEWEST not in remote.files()
    make(mirror, 1)
    push(mirror)
    assert json.loads(remote.read(m.NEWEST)) == {"step": 1}


def test_a_checkpoint_that_is_removed_here_while_it_is_uploaded_is_left_out(mirror, remote):
    make(mirror, 1)
    (mirror._folder / "checkpoints/1" / STATE).unlink()
    push(mirror)
    assert steps(remote) == []


def refuse(remote, monkeypatch, times=10**6, only=""):
    """Has the bucket refuse so many writes of files whose names hold `only`."""
    system, left = type(remote._fs()), [times]
    write = system.pipe_file

    def fail(self, path, *arguments, **more):
        if only in path and left[0] > 0:
            left[0] -= 1
            raise ConnectionError("gone")
        return write(self, path, *arguments, **more)

    monkeypatch.setattr(system, "pipe_file", fail)


def test_a_step_that_is_saved_again_is_whole_beside_tries_that_fail(mirror, remote, tmp_path, operations, monkeypatch):
    make(mirror, 1)
    push(mirror)
    shutil.rmtree(mirror._folder / "checkpoints/1")
    make(mirror, 1, b"weights again")
    moments = []
    operations.after = lambda: moments.append(whole(remote, tmp_path / "now"))
    refuse(remote, monkeypatch, times=1, only=f"checkpoints/1/{STATE}")  # when the former one's seal is removed
    with pytest.raises(Unreachable):
        push(mirror)
    assert steps(remote) == ["superseded/1"] and remote.read(f"superseded/1/{STATE}") == b"weights"
    push(mirror)
    assert all(moments) and whole(remote, tmp_path / "now") == ["checkpoints/1"]
    assert remote.read(f"checkpoints/1/{STATE}") == b"weights again"
    assert not any(name.startswith("superseded") for name in remote.files())


def test_damage_on_this_machine_costs_the_bucket_nothing(mirror, remote):
    mirror._twin.begin("mine")
    make(mirror, 1)
    push(mirror)
    mirror._twin.close()
    (mirror._folder / "checkpoints/1" / STATE).write_bytes(b"weight")
    folder = Mirror(Twin(remote.address, "--workdir", trains=True)).catch_up()
    assert folder == mirror._folder and find_damage(folder / "checkpoints/1", 1) is None
    assert steps(remote) == ["checkpoints/1"] and remote.read(f"checkpoints/1/{STATE}") == b"weights"


def test_a_session_that_another_has_overtaken_changes_nothing_in_the_bucket(mirror, remote, tmp_path, monkeypatch):
    said = []
    mirror.begin(said.append)
    make(mirror, 1)
    mirror.finish()
    fresh_machine(monkeypatch, tmp_path / "another")
    other = Mirror(Twin(remote.address, "--workdir", trains=True))
    other.catch_up()
    other.begin(print)
    before = remote.files()
    shutil.rmtree(mirror._folder / "checkpoints/1")
    make(mirror, 2)
    (mirror._folder / "metrics.jsonl").write_text("1")
    for end in (mirror.finish, mirror.close, mirror._push_others):
        with pytest.raises(Overtaken, match=r"^another command has begun to train in s3://bucket/run; this one stops"):
            end()
    assert remote.files() == before and not said
    other.close()


def test_nothing_is_removed_while_a_complete_step_is_not_up(mirror, remote):
    make(mirror, 1)
    push(mirror)
    shutil.rmtree(mirror._folder / "checkpoints/1")
    make(mirror, 2)  # after `_upload_new` has looked
    assert not mirror._remove_old() and steps(remote) == ["checkpoints/1"]
    push(mirror)
    assert steps(remote) == ["checkpoints/2"]


def test_the_thread_works_by_itself_and_the_end_waits_for_it(remote, mirror):
    said = []
    mirror.begin(said.append)
    make(mirror, 1)
    deadline = time.monotonic() + 10
    while steps(remote) != ["checkpoints/1"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    make(mirror, 2)
    (mirror._folder / "metrics.jsonl").write_text("1")
    mirror.close()
    assert steps(remote) == ["checkpoints/1", "checkpoints/2"] and "metrics.jsonl" in remote.files() and not said


def test_a_checkpoint_that_cannot_be_uploaded_is_tried_again_then_ends_the_run_in_one_line(remote, mirror, monkeypatch):
    make(mirror, 1)
    refuse(remote, monkeypatch, times=2, only="checkpoints")
    mirror.finish()
    assert steps(remote) == ["checkpoints/1"]
    make(mirror, 2)
    refuse(remote, monkeypatch, only="checkpoints")
    line = (
        "the newest checkpoint cannot be uploaded: --workdir=s3://bucket/run cannot be written to: the storage does "
        "not answer (gone); is the network up, and the endpoint right?; the ones before are kept there, it is kept "
        "here, and the same command on this machine uploads it and goes on"
    )
    with pytest.raises(UserError, match=re.escape(line)):
        mirror.finish()
    tries = mirror._remote.put = lambda *arguments: pytest.fail("it is not tried for ever")
    assert tries and mirror.close() is None
    assert steps(remote) == ["checkpoints/1"]


def test_a_checkpoint_that_this_machine_cannot_read_ends_the_run_in_one_line_too(remote, mirror, monkeypatch):
    make(mirror, 1)
    read = pathlib.Path.read_bytes

    def fail(file):
        if file.name == "x":
            raise OSError(5, "Input/output error", str(file))
        return read(file)

    monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
    with pytest.raises(UserError, match=rf"^the newest .*/{STATE}: Input/output error \(on this machine\); the ones"):
        mirror.finish()

    def list_nothing(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(pathlib.Path, "iterdir", list_nothing)
    with pytest.raises(UserError, match=r"^the newest checkpoint .* Input/output error.*; the ones before are"):
        mirror.finish()
    assert steps(remote) == []


def test_metrics_that_cannot_be_uploaded_are_a_warning_said_once(remote, mirror, monkeypatch):
    said = []
    mirror.begin(said.append)
    refuse(remote, monkeypatch, only="metrics")
    monkeypatch.setattr(m, "LOG_SECONDS", 0.0)
    (mirror._folder / "metrics.jsonl").write_text("1")
    make(mirror, 1)
    deadline = time.monotonic() + 10
    while not said:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mirror.close()
    assert steps(remote) == ["checkpoints/1"] and len(said) == 2
    assert "cannot be written to: the storage does not answer (gone)" in said[0] and "tried again" in said[0]
    assert "the checkpoints are there, but not all of the metrics and other files" in said[1]


def test_a_folder_of_this_machine_is_as_ever(tmp_path):
    with run_folder(str(tmp_path / "run"), 0) as (folder, mirror):
        assert folder == tmp_path / "run" and mirror is None


def test_an_error_of_the_run_is_the_one_that_is_told_and_what_there_is_is_uploaded(remote, monkeypatch):
    with pytest.raises(UserError, match=r"^of the run$"), run_folder(remote.address, 0) as (_, mirror):
        mirror.begin(print)
        make(mirror, 1)
        refuse(remote, monkeypatch, times=2, only="checkpoints")
        raise UserError("of the run")
    assert steps(remote) == ["checkpoints/1"]


def params(path):
    return jax.tree.leaves(restore_workdir(str(path), "latest").state.params)


def fresh_machine(monkeypatch, folder):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(folder))


def test_a_run_goes_on_on_a_fresh_machine_and_ends_as_an_undisturbed_one(remote, tmp_path, monkeypatch, capfd):
    options = dict(checkpoint__every_steps=2, checkpoint__keep=1)
    train(tiny.config(**options), str(tmp_path / "whole"))
    train(tiny.config(training__steps=3, **options), remote.address)
    fresh_machine(monkeypatch, tmp_path / "another")
    capfd.readouterr()
    train(tiny.config(**options), remote.address)
    output = capfd.readouterr().out
    assert f"resuming {remote.address} at step 3; changed: training.steps: 3 -> 6" in output
    assert "another" not in output  # the copy's folder is never named
    fresh_machine(monkeypatch, tmp_path / "third")
    for a, b in zip(params(tmp_path / "whole"), params(remote.address), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = remote.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 6
    assert not list((tmp_path / "third" / "runs").glob("*train*"))  # who reads has a copy of its own


def test_every_command_takes_the_address_of_a_run(remote, tmp_path, capsys):
    train(tiny.config(training__steps=2), remote.address)
    main(["summary", f"--workdir={remote.address}"])
    assert "cifar_resnet8, attention hga" in capsys.readouterr().out
    assert read_run(remote.address, None, epochs=False).curves["eval/loss"].steps == [2]
    told = workdir_state(remote.address, tiny.config())
    assert told == f"{remote.address}: goes on from step 2; changed: training.steps: 2 -> 6"
    copied = [p.name for p in (tmp_path / "cache/runs").rglob("checkpoints/2/*") if "read" in str(p)]
    assert copied == ["seal.json"]  # of the checkpoints these three need no more
    assert Predictor.from_workdir(remote.address).restored.step == 2
    for source in (remote.address, f"{remote.address}@latest", f"{remote.address}@2"):
        origin = read_source(tiny.config(init__from=source), ()).origin
        assert origin.startswith(f"step 2 of {remote.address}, cifar_resnet8 with attention hga")
    with pytest.raises(UserError, match=rf"^init\.from={remote.address}/x\.pth: there is no such file$"):
        read_source(tiny.config(init__from=f"{remote.address}/x.pth"), ())
    with pytest.raises(UserError, match=rf"^--workdir={remote.address}x: no run here"):
        restore_workdir(f"{remote.address}x")


def test_another_model_is_refused_before_anything_is_written(remote, operations):
    train(tiny.config(training__steps=2), remote.address)
    operations.clear()
    with pytest.raises(UserError, match=f"^--workdir={remote.address} belongs to another run"):
        train(tiny.config(model__attention="none"), remote.address)
    assert operations == []


LONG = (*TINY, "--config.training.steps=60", "--config.checkpoint.every_steps=7", "--config.checkpoint.keep=2")


def wait_for_step(remote, step, process):
    deadline = time.monotonic() + 300
    while not any(int(name.split("/")[1]) >= step for name in steps(remote)):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


def same_parameters(one, other):
    for a, b in zip(params(one), params(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param(s, marks=buckets.needs(s)) for s in ("s3", "gs")])
def test_a_killed_run_goes_on_on_a_fresh_machine_by_the_real_protocol(scheme, tmp_path, monkeypatch):
    """Killed once at any moment, stopped once in good order; then a step's seal is taken away, as by a kill before."""
    undisturbed = commands.run(*LONG, f"--workdir={tmp_path / 'whole'}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    with buckets.serve(scheme):
        run, machines = f"{scheme}://bucket/a/run", iter(range(100))
        remote = Remote(run, "--workdir")
        for stop, after in ((signal.SIGKILL, 7), (signal.SIGTERM, 20)):
            fresh_machine(monkeypatch, tmp_path / f"machine_{next(machines)}")
            process = commands.start(*LONG, f"--workdir={run}")
            wait_for_step(remote, after, process)
            process.send_signal(stop)
            error = process.communicate(timeout=100)[1].decode()
            assert process.returncode == (-stop if stop == signal.SIGKILL else 143), error
        assert "after step" in error and str(max(int(name.split("/")[1]) for name in steps(remote))) in error
        newest = max(steps(remote), key=lambda name: int(name.split("/")[1]))
        remote.delete([f"{newest}/seal.json"])
        fresh_machine(monkeypatch, tmp_path / f"machine_{next(machines)}")
        result = commands.run(*LONG, f"--workdir={run}")
        assert result.returncode == 0, result.stderr
        before = int(re.search(rf"resuming {run} at step (\d+)", result.stdout)[1])
        assert 7 <= before < int(newest.split("/")[1])
        fresh_machine(monkeypatch, tmp_path / f"machine_{next(machines)}")
        same_parameters(tmp_path / "whole", run)
        there, here = (commands.run("evaluate.py", f"--workdir={w}", "--json") for w in (run, tmp_path / "whole"))
        assert there.stdout.splitlines()[-1] == here.stdout.splitlines()[-1], there.stderr
        logged = [json.loads(line) for line in remote.read("metrics.jsonl").decode().splitlines()]
        keys = [(line["step"], "eval/loss" in line) for line in logged]
        assert sorted(set(keys)) == keys and keys[-1] == (60, True)  # each line once, though sessions were killed


@pytest.mark.slow
@buckets.needs("s3")
def test_two_processes_share_a_run_in_a_bucket_and_end_as_one(tmp_path, monkeypatch):
    options = (*TINY, "--config.optimizer.learning_rate=0.01", "--config.training.steps=12")
    options += ("--config.checkpoint.every_steps=5", "--config.schedule.name=constant")
    one = commands.run(*options, f"--workdir={tmp_path / 'one'}", devices=8)
    assert one.returncode == 0, one.stderr
    fresh_machine(monkeypatch, tmp_path / "machine")
    with buckets.serve("s3"):
        run = "s3://bucket/a/run"
        for last in (7, 12):  # the second session goes on from the first
            outputs = []
            for process in start_processes(*options, f"--config.training.steps={last}", f"--workdir={run}"):
                outputs.append(process.communicate(timeout=500))
                assert process.returncode == 0, outputs[-1][1]
            assert "2 process(es)" in outputs[0][0] and "finished" in outputs[0][0]
        assert f"resuming {run} at step 7" in outputs[0][0]
        found = whole(Remote(run, "--workdir"), tmp_path / "fresh")
        assert found[-1] == "checkpoints/7" and "checkpoints/12" in found
        there, here = restore_workdir(run, "latest"), restore_workdir(str(tmp_path / "one"), "latest")
        assert there.step == here.step == 12
        for tree in ("params", "batch_stats"):
            pairs = zip(*(jax.tree.leaves(getattr(r.state, tree)) for r in (there, here)), strict=True)
            for a, b in pairs:
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        evaluations = []
        for process in start_processes("evaluate.py", f"--workdir={run}", "--json"):
            evaluations.append(process.communicate(timeout=500))
            assert process.returncode == 0, evaluations[-1][1]
        assert '"num_examples": 297' in evaluations[0][0] and '"num_examples"' not in evaluations[1][0]
