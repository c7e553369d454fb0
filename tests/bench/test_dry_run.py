import dataclasses
import shutil
import sys
import time

import jax
import pytest

import train
from hga_flax.bench import dry_run as d
from hga_flax.counting.complexity import complexity
from hga_flax.data.sources import DatasetInfo, SyntheticSource
from hga_flax.errors import UserError
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.workdir import write_config
from hga_flax.training.experiment import create_experiment, prepare
from tests import commands
from tests.training import tiny

INFO = DatasetInfo("digits", 10, 1, ())


def prepared(**overrides):
    experiment = create_experiment(tiny.config(**overrides), INFO)
    return experiment, prepare(experiment)


@pytest.mark.medium
def test_a_dry_run_tells_the_run_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SyntheticSource, "__getitem__", None)  # no image is read
    workdir = tmp_path / "a" / "run"
    d.dry_run(tiny.config(), str(workdir))
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for expected in (
        f"{workdir}: a new run",
        "6 = 2 epochs",
        "2, every 3 steps and at the end, each on 48 images in 3 batches of 16",
        "the latest 3 and the best are kept",
        "last step",
        "stage1",
        "(estimate: kept for the backward pass",
        "of state and batch",  # so small a step is compiled
        "(measured here on zeros, without data loading)",
        "with the evaluations (estimate)",
    ):
        assert expected in out


def test_the_weights_of_a_new_run_are_checked(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"^init\.weights=.*run is not a run's folder"):
        d.dry_run(tiny.config(init__weights=str(tmp_path / "run")))
    assert capsys.readouterr().out == ""  # before anything is built
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    assert d.checkpoint_steps(str(tmp_path / "run")) == [3]  # one that goes on does not read them


def corners(**overrides):
    experiment, ready = prepared(**overrides)
    return d.schedule_rows(experiment.config, ready)


def test_the_schedule_is_told_at_its_corners():
    rows = corners(training__steps=60, schedule__name="step", schedule__decay_at_steps=(20, 80),
                   schedule__warmup_steps=10)  # fmt: skip
    assert rows == [
        ("0", "0.00", "0", "start"),
        ("10", "3.33", "0.05", "end of the warm-up"),
        ("20", "6.67", "0.005", "decay"),
        ("59", "19.67", "0.005", "last step"),
        ("80", "26.67", "-", "decay, after the end of this run"),
    ]
    assert ("30", "10.00", "0.025", "halfway through the decay") in corners(training__steps=60, schedule__name="cosine")
    many = corners(training__steps=60, schedule__name="step", schedule__decay_every_epochs=1.0)
    assert len(many) == 11 and many[-1] == ("...", "", "", "and 12 more decays, the last at step 60")


@pytest.mark.medium
def test_the_cost_fits_the_network_and_what_xla_says_where_it_is_asked(monkeypatch):
    # Without HGA: at 8x8 its shifted cells are ten times the map, workspace that is not kept for the backward pass.
    experiment, ready = prepared(model__attention="none")
    monkeypatch.setattr(d, "QUICK", 0)
    monkeypatch.setattr(d, "measured_speed", lambda *device: 1e10)
    bound = d.step_cost(experiment, ready, compile_step=False)
    assert bound.compiled is None and bound.measured is None
    assert "at least " in d.time_rows(experiment, ready.plan, bound)[1][1]
    cost = d.step_cost(experiment, ready, compile_step=True)
    monkeypatch.setattr(d, "SHORT", 0)
    assert d.step_cost(experiment, ready, compile_step=True).measured is None
    # Forward, and twice that backward; a multiply-accumulate is two operations; 2 images on each device.
    macs = complexity(experiment.model, experiment.image_shape).conv_fc_macs
    assert 0.7 < cost.flops / (2 * 3 * 2 * macs) < 1.4
    assert cost.memory["optimizer"] == cost.memory["parameters"] + 4  # the momentum, and the step of the schedule
    assert cost.memory["gradients"] == cost.memory["parameters"]
    assert cost.memory["batch"] == 2 * (8 * 8 + 3 * 4)
    arguments, temporaries = cost.compiled
    own = cost.memory["parameters"] + cost.memory["optimizer"] + cost.memory["batch statistics"]
    assert own < arguments < own + cost.memory["batch"] + 1000
    assert 0.3 < cost.memory["activations"] / temporaries < 3


def test_a_step_is_timed_with_what_it_is_called_with_and_the_first_call_does_not_count():
    _, ready = prepared()
    shapes, calls = {"image": jax.ShapeDtypeStruct((2, 3), "uint8", sharding=ready.state.step.sharding)}, []

    def step(state, batch):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), (state, batch)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), (ready.state, shapes)
        )
        calls.append(time.sleep(0.3 if not calls else 0.05))
        return state

    assert 0.05 <= d.measured_seconds(step, ready.state, shapes) < 0.3 and len(calls) == 4

    def fail(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    assert d.measured_seconds(fail, ready.state, shapes) is None


def test_the_speed_is_one_that_a_machine_can_have():
    assert 1e8 < d.measured_speed(jax.devices()[0], "float32", seconds=0.1) < 1e16


def test_a_workdir_is_looked_at_and_not_touched(tmp_path):
    c = tiny.config()
    (tmp_path / "checkpoints" / "120").mkdir(parents=True)
    (tmp_path / "checkpoints" / "80").mkdir()
    write_config(tmp_path, tiny.config(training__steps=9))
    assert d.workdir_state(str(tmp_path), c).endswith(": resumes from step 120; changed: training.steps: 9 -> 6")
    write_config(tmp_path, tiny.config(model__attention="none"))
    with pytest.raises(UserError, match=r"belongs to another run: there model\.attention is 'none', here 'hga'"):
        d.workdir_state(str(tmp_path), c)
    with pytest.raises(UserError, match="--workdir=/dev/null/x cannot be written to: /dev/null is not a folder"):
        d.workdir_state("/dev/null/x", c)


def test_a_workdir_that_training_refuses_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"checkpoints may be lost below a path with \["):
        d.workdir_state(str(tmp_path / "a[1]"), tiny.config())


def test_the_newest_checkpoint_must_fit_the_run(tmp_path):
    config = tiny.config()
    write_config(tmp_path, config)
    _, state, _ = tiny.build(config, tiny.mesh(1))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {}, None)
    checkpoints.close()

    def told(**overrides):
        experiment, ready = prepared(**overrides)
        return d.workdir_state(str(tmp_path), experiment.config, ready.state)

    assert told().endswith(": resumes from step 3")
    experiment, ready = prepared()
    state = lambda plan: d.workdir_state(str(tmp_path), experiment.config, ready.state, plan=plan)
    assert state(dataclasses.replace(ready.plan, total_steps=3)).startswith("training is complete: ")
    with pytest.raises(UserError, match="has 5 examples, but this run started with 0: the data set has changed"):
        state(dataclasses.replace(ready.plan, num_examples=5))
    with pytest.raises(
        UserError, match=r"another optimizer or average; changed since: optimizer\.name: sgd -> adamw; undo that"
    ):
        told(optimizer__name="adamw")
    (tmp_path / "checkpoints" / "5").mkdir()
    assert "resumes from step 5, or from an older one: checkpoint" in told()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint, but this run had one of step 3"):
        told()


def test_sizes():
    assert [d.size(n) for n in (0, 999, 1000, 2.5e9, 3e15)] == ["0 B", "999 B", "1 kB", "2.5 GB", "3e+03 TB"]


@pytest.mark.slow
def test_the_papers_network_is_told_in_less_than_a_minute(tmp_path):
    start = time.monotonic()
    result = commands.run(
        "train.py", "--config=configs/hga_resnext50.py", "--config.data.fake=true", "--dry-run",
        "--config.training.batch_size=64", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "26,128,680 parameters" in result.stdout and "14x14x1024" in result.stdout
    assert not (tmp_path / "run").exists() and time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dry-run"], (None, False)),
        (["--dry-run", "--workdir=runs/x"], ("runs/x", False)),
        (["--dry-run=compile"], (None, True)),
        (["--dry_run"], (None, False)),
    ],
)
def test_the_flag_makes_a_dry_run_in_the_place_of_a_run(arguments, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(d, "dry_run", lambda config, workdir, compile_step: calls.append((workdir, compile_step)))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=configs/digits.py", *arguments])
    train.main()
    assert calls == [expected]


@pytest.mark.medium
def test_the_command_refuses_what_training_refuses():
    result = commands.run("train.py", "--config=configs/digits.py", "--dry-run", "--config.training.batch_size=1501")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "error: training.batch_size=1501: the training split has only 1500 examples\n"
    result = commands.run("train.py", "--config=configs/digits.py")
    assert result.returncode == 1
    assert (
        result.stderr == "error: --workdir=DIR is missing: the folder for checkpoints and metrics; or try --dry-run\n"
    )
