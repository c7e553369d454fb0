"""A finished or running workdir turned back into a network and its parameters."""

import dataclasses
import sys
from typing import Any

import jax
import optax

from hga_flax.errors import ConfigError, UserError, expand
from hga_flax.training import workdir as files
from hga_flax.training.checkpoints import Checkpoints
from hga_flax.training.evaluation import evaluate
from hga_flax.training.experiment import Experiment, create_experiment
from hga_flax.training.mesh import create_mesh
from hga_flax.training.state import TrainState, abstract_state
from hga_flax.training.step import make_eval_step
from hga_flax.validation import check_keys


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint of a workdir, ready to be used."""

    experiment: Experiment
    state: TrainState
    step: int


def restore_workdir(
    path: str, checkpoint: str = "best", data_dir: str | None = None, batch_size: int | None = None
) -> Restored:
    """Rebuilds the network of a workdir and loads one of its checkpoints; writes nothing.

    Args:
        path: the workdir.
        checkpoint: "best" (lowest top-1 error), "latest" or a step. Where one of the former two is damaged, a warning
            on stderr names it and the next in order takes its place.
        data_dir: where the data set lies, if not where the run had it.
        batch_size: of an evaluation, if not the run's (rounded up to the number of devices).

    Raises:
        UserError: no run, no such checkpoint, or it cannot be read.
    """
    workdir = expand(path, "--workdir").absolute()
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
            raise ConfigError(f"--batch-size={batch_size}: must be at least 1")
        size = batch_size or config.evaluation.batch_size or config.training.batch_size
        # A run may be evaluated on fewer or more devices than it was trained on.
        config.evaluation.batch_size = -(-size // devices) * devices
    experiment = create_experiment(config, files.read_dataset(workdir), train=False)
    # Only the structure of the optimizer's state matters here, not its rate.
    init = experiment.init(experiment.optimizer(optax.constant_schedule(0.0)))
    like = abstract_state(init, experiment.mesh)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={path}: no checkpoint here yet")
    checkpoints = Checkpoints(workdir, read_only=True, warn=_warn)
    try:
        restored = _restore(checkpoints, checkpoint, path, like)
    finally:
        checkpoints.close()
    return Restored(experiment, restored[1], restored[0])


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _restore(checkpoints: Checkpoints, checkpoint: str, path: str, like: TrainState) -> tuple[int, TrainState, dict]:
    steps = checkpoints.steps()
    if checkpoint == "latest":
        restored = checkpoints.restore_latest(like)
    elif checkpoint == "best":
        restored = checkpoints.restore_best(like)
        if steps and restored is None:
            raise UserError(
                f"--checkpoint=best: none of the checkpoints of {path} was evaluated; use --checkpoint=latest"
            )
    elif steps and not (checkpoint.isdecimal() and int(checkpoint) in steps):
        known = ", ".join(map(str, steps))
        raise UserError(f"--checkpoint={checkpoint}: choose best, latest or one of the steps {known}")
    else:
        restored = (int(checkpoint), *checkpoints.restore(int(checkpoint), like)) if steps else None
    if restored is None:
        raise UserError(f"--workdir={path}: no checkpoint here yet")
    return restored


def evaluate_workdir(
    path: str,
    checkpoint: str = "best",
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint; see `restore_workdir` for the arguments.

    Returns:
        `top1_error` and `top5_error` (percent), `loss` (nats), `num_examples`, `step` and `split`.
    """
    restored = restore_workdir(path, checkpoint, data_dir, batch_size)
    experiment, state = restored.experiment, restored.state
    split = split or experiment.config.data.eval_split
    batches = experiment.dataset.eval_batches(
        experiment.dataset.source(split), experiment.eval_batch_size, experiment.shard
    )
    step = make_eval_step(experiment.model, experiment.config, experiment.mesh)
    metrics = evaluate(step, state.params, state.batch_stats, batches, experiment.mesh)
    return metrics | {"step": int(jax.device_get(state.step)), "split": split}
