"""Checkpoints with Orbax: asynchronous, the latest N and the best, newest readable first.

A checkpoint holds two items: `state` (the TrainState) and `run` (JSON: the place in the data, the
best metric so far, elapsed seconds).
"""

import logging
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from hga_flax.errors import UserError, one_line

Warn = Callable[[str], None]


def rank(metrics: Mapping[str, float | None]) -> tuple[float, float]:
    """Orders evaluations, the best first: by top-1 error; on small splits that often ties, so then by loss."""
    loss = metrics["loss"]
    return metrics["top1_error"], math.inf if loss is None or not math.isfinite(loss) else loss


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: they lie in its folder `checkpoints`.
        keep: how many of the latest to keep; the best is kept beside them.
        read_only: never create, write or remove anything.
        warn: called with one line for each checkpoint that cannot be read.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 3, read_only: bool = False, warn: Warn = print):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells each step of each save
        self._directory, self._warn = workdir / "checkpoints", warn
        latest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=rank,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            best_fn=rank,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=True,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._directory.absolute(), options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, run: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Starts writing a checkpoint; returns once the state is copied off the devices."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step that ranks first, or None where no kept step has been evaluated."""
        evaluated = {step: metrics for step in self.steps() if (metrics := self.metrics(step))}
        return min(evaluated, key=lambda step: rank(evaluated[step]), default=None)

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns the evaluation that a checkpoint was saved with, if any."""
        return self._manager.metrics(step)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns (state, run) of a step, placed as the tree `like` is.

        Raises:
            UserError: it cannot be read, or it holds another network's state.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            self._check_structure(step, abstract)
            items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever the damage provokes
            raise UnreadableCheckpoint(
                f"checkpoint {self._directory / str(step)} cannot be read: {one_line(error)[:300]}"
            ) from error
        return restored.state, restored.run

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns (step, state, run) of the newest checkpoint that reads, or None if there is none at all.

        A damaged one is named through `warn` and passed over.

        Raises:
            UserError: there are checkpoints, but none reads, or they are another network's.
        """
        self.wait()  # a step that is still being written counts as there
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, *self.restore(step, like)
            except UnreadableCheckpoint as error:
                self._warn(f"warning: {error}; trying the one before")
        if steps:
            raise UserError(
                f"none of the {len(steps)} checkpoints in {self._directory} can be read; "
                "mend or move that folder, or choose another --workdir"
            )
        return None

    def _check_structure(self, step: int, like: Any) -> None:
        """Raises a UserError where the checkpoint's parameters have other names or shapes."""
        saved = self._manager.item_metadata(step).state
        if saved is None:
            raise ValueError("its state is missing")
        tree = getattr(saved, "tree", saved)
        shapes = {name: tuple(leaf.shape) for name, leaf in _named(tree["params"])}
        wanted = {name: tuple(leaf.shape) for name, leaf in _named(like.params)}
        if shapes != wanted:
            name = next(name for name in {**wanted, **shapes} if shapes.get(name) != wanted.get(name))
            raise UserError(
                f"the checkpoint {self._directory / str(step)} belongs to another model: {name} is "
                f"{shapes.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this one; "
                "choose another --workdir, or the model it was trained with"
            )

    def wait(self) -> None:
        """Blocks until the last checkpoint is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last checkpoint and releases the writer's threads."""
        self._manager.close()


class UnreadableCheckpoint(UserError):
    """A checkpoint whose files are damaged."""


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]
