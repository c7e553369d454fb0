"""A finished or running workdir turned back into a network and its parameters."""

import contextlib
import dataclasses
import sys
from typing import Any

import jax
import optax

from hga_flax.config.rules import check_keys
from hga_flax.errors import ConfigError, UserError, called
from hga_flax.processes.distributed import barrier
from hga_flax.processes.mesh import create_mesh
from hga_flax.processes.settings import configure_process
from hga_flax.runs import workdir as files
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.local_copy import find
from hga_flax.training.evaluation import evaluate, no_images
from hga_flax.training.experiment import Experiment, create_experiment
from hga_flax.training.state import TrainState, abstract_state
from hga_flax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint of a workdir, ready to be used."""

    experiment: Experiment
    state: TrainState
    step: int
    weights: str = "raw"
    origin: str = ""  # of weights without a run, see from_weights.py
    known: Any = None  # how their images are prepared, if that is known by name

    @property
    def variables(self) -> dict[str, Any]:
        """The weights to use, {"params", "batch_stats"}, as the network's `apply` takes them: those of `weights`."""
        return self.state.variables(self.weights)


def configure_for(path: str) -> None:
    """Sets what is the whole process's as a run has it, for commands alone, before a device is touched.

    Args:
        path: the workdir.

    Raises:
        UserError: no run, or it cannot be read.
    """
    with contextlib.suppress(ConfigError):  # `restore_workdir` says what is wrong
        configure_process(files.read_config(find(path, light=True)), train=False)


def restore_workdir(
    path: str,
    checkpoint: str = "best",
    data_dir: str | None = None,
    batch_size: int | None = None,
    weights: str | None = None,
) -> Restored:
    """Rebuilds the network of a workdir and loads one of its checkpoints; writes nothing there.

    Flags, caches and loggers of the process stay as they are: XLA_FLAGS=--xla_gpu_deterministic_ops=true and
    `jax.config.update("jax_compilation_cache_dir", ...)` are the caller's to set, before JAX touches a device.

    Args:
        path: the workdir.
        checkpoint: "best" (lowest top-1 error), "latest" or a step. Where one of the former two is damaged, a warning
            on stderr names it and the next in order takes its place.
        data_dir: where the data set lies, if not where the run had it.
        batch_size: of an evaluation, if not the run's (rounded up to the number of devices).
        weights: "ema", "raw", or None: the moving average where the run keeps one.

    Raises:
        UserError: no run, no such checkpoint, no such weights, or it cannot be read.
    """
    workdir = find(path, "workdir")
    config = files.read_config(workdir)
    try:
        check_keys(config)
    except ConfigError as error:
        raise UserError(f"{workdir / 'config.json'} cannot be used: {error}") from None
    with config.unlocked():
        if data_dir is not None:
            config.data.dir = data_dir
        devices = create_mesh().devices.size
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1")
        size = batch_size or config.evaluation.batch_size or config.training.batch_size
        # A run may be evaluated on fewer or more devices than it was trained on.
        config.evaluation.batch_size = -(-size // devices) * devices
    experiment = create_experiment(config, files.read_dataset(workdir), train=False)
    # Only the structure of the optimizer's state matters here, not its rate.
    init = experiment.init(experiment.optimizer(optax.constant_schedule(0.0)))
    like = abstract_state(init, experiment.mesh)
    like.variables(weights)  # are there such?
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{path}: no checkpoint here yet")
    checkpoints = Checkpoints(workdir, read_only=True, warn=_warn)
    try:
        step, state, _ = _restore(checkpoints, checkpoint, path, like)
    finally:
        checkpoints.close()
    return Restored(experiment, state, step, weights or ("raw" if state.ema is None else "ema"))


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(called(text), file=sys.stderr, flush=True)


def _restore(checkpoints: Checkpoints, checkpoint: str, path: str, like: TrainState) -> tuple[int, TrainState, dict]:
    if checkpoint == "latest":
        restored = checkpoints.restore_latest(like)
        if restored is None:
            raise UserError(f"{path}: no checkpoint here yet")
        return restored
    step = choose_step(checkpoints, checkpoint, path)
    if checkpoint == "best" and (restored := checkpoints.restore_best(like)):
        return restored
    return step, *checkpoints.restore(step, like)


def choose_step(checkpoints: Checkpoints, checkpoint: str, path: str, given: str | None = None) -> int:
    """Returns the step that "best", "latest" or a number means.

    Args:
        checkpoints: of the workdir.
        checkpoint: what is asked for.
        path: the workdir, as messages call it.
        given: how it was asked for.

    Raises:
        UserError: there is no such checkpoint.
    """
    given = given or f"checkpoint={checkpoint}"
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{path}: no checkpoint here yet")
    if checkpoint == "best":
        best = checkpoints.best_step()
        if best is None:
            raise UserError(f"{given}: none of the checkpoints of {path} was evaluated; use 'latest'")
        return best
    if checkpoint == "latest":
        return steps[-1]
    if not checkpoint.isdecimal() or int(checkpoint) not in steps:
        raise UserError(f"{given}: choose best, latest or one of the steps {', '.join(map(str, steps))}")
    return int(checkpoint)


def evaluate_workdir(
    path: str,
    checkpoint: str = "best",
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint; see `restore_workdir` for the arguments.

    Returns:
        `top1_error` and, of more than five classes, `top5_error` (percent), `loss` (nats), `num_examples`,
        `step`, `split` and `weights` ("ema" or "raw").
    """
    return evaluate_restored(restore_workdir(path, checkpoint, data_dir, batch_size, weights), split)


def evaluate_restored(restored: Restored, split: str | None = None) -> dict[str, Any]:
    """Evaluates weights on a split, the evaluation's unless given; returns what `evaluate_workdir` returns."""
    experiment, state = restored.experiment, restored.state
    params, batch_stats = restored.variables["params"], restored.variables["batch_stats"]
    split = split or experiment.config.data.eval_split
    batches = experiment.dataset.eval_batches(
        experiment.dataset.source(split, train=False), experiment.eval_batch_size, experiment.shard, split
    )
    barrier("each has the data set")  # one may have to copy it from a bucket
    step = make_eval_step(experiment.model, experiment.config, experiment.mesh)
    metrics = evaluate(step, params, batch_stats, batches, experiment.mesh)
    if not metrics["num_examples"]:
        raise UserError(no_images(split))
    return metrics | {"step": int(jax.device_get(state.step)), "split": split, "weights": restored.weights}
