"""Whole runs in buckets: most in one that this process remembers, the slow ones by the real protocols."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from hga_flax.__main__ import main
from hga_flax.bench.dry_run import workdir_state
from hga_flax.errors import UserError
from hga_flax.inference.predictor import Predictor
from hga_flax.pictures.curves import read_run
from hga_flax.storage.buckets import Remote
from hga_flax.training.restore import restore_workdir
from hga_flax.training.trainer import train
from hga_flax.training.weights_source import read_source
from tests import buckets, commands
from tests.buckets import fresh_machine, steps, whole
from tests.test_train import ONE_BLOCK, TINY
from tests.training import tiny
from tests.training.processes import start_processes


@pytest.fixture
def remote(bucket):
    return Remote(f"{bucket}/run", "--workdir")


def params(path):
    return jax.tree.leaves(restore_workdir(str(path), "latest").state.params)


@pytest.mark.medium
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


@pytest.mark.medium
def test_every_command_takes_the_address_of_a_run(remote, tmp_path, capsys):
    train(tiny.config(training__steps=2), remote.address)
    main(["summary", f"--workdir={remote.address}"])
    assert "cifar_resnet8, attention hga" in capsys.readouterr().out
    assert read_run(remote.address, None, epochs=False).curves["eval/loss"].steps == [2]
    told = workdir_state(remote.address, tiny.config())
    assert told == f"{remote.address}: resumes from step 2; changed: training.steps: 2 -> 6"
    copied = [p.name for p in (tmp_path / "cache/runs").rglob("checkpoints/2/*") if "read" in str(p)]
    assert copied == ["seal.json"]  # of the checkpoints these three need no more
    assert Predictor.from_workdir(remote.address).restored.step == 2
    for source in (remote.address, f"{remote.address}@latest", f"{remote.address}@2"):
        origin = read_source(tiny.config(init__weights=source), {}).origin
        assert origin.startswith(f"step 2 of {remote.address}, cifar_resnet8 with attention hga")
    with pytest.raises(UserError, match=rf"^init\.weights={remote.address}/x\.pth: there is no such file$"):
        read_source(tiny.config(init__weights=f"{remote.address}/x.pth"), {})
    with pytest.raises(UserError, match=rf"^{remote.address}x: no run here"):
        restore_workdir(f"{remote.address}x")


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
            output, error = process.communicate(timeout=100)
            assert process.returncode == (-stop if stop == signal.SIGKILL else 143), output + error
        assert "after step" in error and str(max(int(name.split("/")[1]) for name in steps(remote))) in error
        newest = max(steps(remote), key=lambda name: int(name.split("/")[1]))
        remote.delete([f"{newest}/seal.json"])
        fresh_machine(monkeypatch, tmp_path / f"machine_{next(machines)}")
        result = commands.run(*LONG, f"--workdir={run}")
        assert result.returncode == 0, result.stdout + result.stderr
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
    options = (*TINY, *ONE_BLOCK, "--config.optimizer.learning_rate=0.01", "--config.training.steps=12")
    options += ("--config.checkpoint.every_steps=5", "--config.schedule.name=constant")
    one = commands.run(*options, f"--workdir={tmp_path / 'one'}", devices=8)
    assert one.returncode == 0, one.stderr
    fresh_machine(monkeypatch, tmp_path / "machine")
    with buckets.serve("s3"):
        run = "s3://bucket/a/run"
        for last in (7, 12):  # the second session resumes from the first
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
