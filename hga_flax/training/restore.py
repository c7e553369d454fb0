"""Restores the network and its parameters from the workdir of a finished or running run."""

import contextlib
import dataclasses
import os
import sys
from typing import Any

import jax
import optax

from hga_flax.config.checks import check_keys
from hga_flax.errors import ConfigError, UserError, called
from hga_flax.processes.coordination import barrier, check_same_arrays
from hga_flax.processes.mesh import create_mesh
from hga_flax.processes.settings import configure_process
from hga_flax.runs import workdir as files
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.local_copy import find
from hga_flax.runs.manifest import read_again
from hga_flax.training.evaluation import evaluate, no_images
from hga_flax.training.experiment import Experiment, check_data_alike, create_experiment
from hga_flax.training.state import TrainState, abstract_state
from hga_flax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored network, ready for use: a run's checkpoint or a file of weights."""

    experiment: Experiment
    state: TrainState
    step: int | None  # None for a file of weights that does not say
    weights: str = "raw"
    origin: str = ""  # description of weights loaded without a run, see from_weights.py
    known: Any = None  # the known `Preprocessing` of such weights, if any

    @property
    def variables(self) -> dict[str, Any]:
        """The weights selected by `weights`, {"params", "batch_stats"}, as the network's `apply` takes them."""
        return self.state.variables(None if self.state.ema is None else self.weights)  # without a run: its only ones


def configure_for(path: str) -> None:
    """Applies a run's process-wide settings; only for commands, before JAX initialises a device.

    Args:
        path: the workdir.

    Raises:
        UserError: there is no run, or it cannot be read.
    """
    with contextlib.suppress(ConfigError):  # `restore_workdir` says what is wrong
        configure_process(files.read_config(find(path, light=True)), train=False)


def restore_workdir(
    path: str | os.PathLike[str],
    checkpoint: str | int = "best",
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    weights: str | None = None,
) -> Restored:
    """Rebuilds the network of a workdir and loads one of its checkpoints; writes nothing there.

    Flags, caches and loggers of JAX are not changed: put `hga_flax.processes.settings.DETERMINISTIC_FLAGS`
    into XLA_FLAGS and call `jax.config.update("jax_compilation_cache_dir", ...)` yourself, before JAX initialises a
    device.

    Args:
        path: the workdir.
        checkpoint: "best" (lowest top-1 error), "latest" or a step. If the best or latest is damaged, a warning on
            stderr names it and the next one in order is used.
        data_dir: folder of the data set; None for the run's.
        batch_size: batch size of evaluation, rounded up to a multiple of the number of devices; None for the run's.
        weights: "ema", "raw", or None for the moving average if the run keeps one.

    Returns:
        The restored network; `variables` and `experiment.model` apply it.

    Raises:
        UserError: there is no such run, checkpoint or weights, or the checkpoint cannot be read.

    Examples:
        >>> restored = restore_workdir("runs/digits")  # doctest: +SKIP
        >>> restored.experiment.model.apply(restored.variables, jax.numpy.ones((2, 24, 24, 1))).shape  # doctest: +SKIP
        (2, 10)
    """
    workdir = find(os.fspath(path), "workdir")
    config = files.read_config(workdir)
    try:
        check_keys(config)
    except ConfigError as error:
        raise UserError(f"{workdir / 'config.json'} cannot be used: {error}") from None
    with config.unlocked():
        if data_dir is not None:
            config.data.dir = os.fspath(data_dir)
        devices = create_mesh().devices.size
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1")
        size = batch_size or config.evaluation.batch_size or config.training.batch_size
        # A run may be evaluated on fewer or more devices than it was trained on.
        config.evaluation.batch_size = -(-size // devices) * devices
    experiment = create_experiment(config, files.read_dataset(workdir), train=False)
    # Only the structure of the optimizer's state matters here, not the learning rate.
    init = experiment.init(experiment.optimizer(optax.constant_schedule(0.0)))
    like = abstract_state(init, experiment.mesh)
    like.variables(weights)  # raises if the run has no such weights
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{path}: no checkpoint here yet")
    with contextlib.closing(Checkpoints(workdir, read_only=True, warn=warn)) as checkpoints:
        step, state, _ = read_again(lambda: _restore(checkpoints, str(checkpoint), path, like))
    return Restored(experiment, state, step, weights or ("raw" if state.ema is None else "ema"))


def warn(text: str) -> None:
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
    """Returns the step that "best", "latest" or a number refers to.

    Args:
        checkpoints: checkpoints of the workdir.
        checkpoint: "best", "latest" or a step.
        path: name of the workdir in messages.
        given: the user's request in messages.

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
    path: str | os.PathLike[str],
    checkpoint: str | int = "best",
    split: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint; see `restore_workdir` for the arguments.

    Returns:
        `top1_error` (percent), with more than five classes `top5_error` (percent), `loss` (nats),
        `num_examples`, `step`, `split` and `weights` ("ema" or "raw").
    """
    return evaluate_restored(restore_workdir(path, checkpoint, data_dir, batch_size, weights), split)


def evaluate_restored(restored: Restored, split: str | None = None) -> dict[str, Any]:
    """Evaluates weights on a split (default: `data.eval_split`); returns the same as `evaluate_workdir`.

    The step of a file of weights is None, unless the file says it.

    Raises:
        UserError: no image of the split can be read.
    """
    experiment = restored.experiment
    params, batch_stats = restored.variables["params"], restored.variables["batch_stats"]
    split = split or experiment.config.data.eval_split
    batches = experiment.dataset.eval_batches(
        experiment.dataset.source(split, train=False), experiment.eval_batch_size, experiment.shard, split
    )
    barrier("each has the data set")  # a process may first have to copy it from a bucket
    check_data_alike(experiment.dataset.described([split]))
    check_same_arrays("what is evaluated", restored.variables)
    step = make_eval_step(experiment.model, experiment.config, experiment.mesh)
    with jax.set_mesh(experiment.mesh):  # whatever mesh the caller has set
        metrics = evaluate(step, params, batch_stats, batches, experiment.mesh)
    if not metrics["num_examples"]:
        raise UserError(no_images(split))
    return metrics | {"step": restored.step, "split": split, "weights": restored.weights}
