"""How far a run has come: what a checkpoint keeps beside the state, and what is printed where nothing is left."""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass
class Progress:
    """What a checkpoint keeps beside the state, as JSON.

    Attributes:
        examples_seen: place in the global order of training examples.
        num_examples: of the training split, to notice a data set that has changed.
        best: the best evaluation so far and its `step`, or None.
        elapsed_seconds: over all sessions.
        bad_images: indices of training images that could not be decoded, as far as this process has met them.
        evaluation_due: the plan's evaluation of this step was given up for a signal, and is made on going on.
    """

    examples_seen: int = 0
    num_examples: int = 0
    best: dict[str, float] | None = None
    elapsed_seconds: float = 0.0
    bad_images: list[int] = dataclasses.field(default_factory=list)
    evaluation_due: bool = False

    @classmethod
    def restored(cls, run: dict[str, Any]) -> "Progress":
        """Returns what a checkpoint kept."""
        progress = cls(**run)
        if progress.best and progress.best["top1_error"] is None:  # older versions booked an evaluation of no image
            progress.best = None
        return progress


def planned_steps(config: ConfigDict, num_examples: int) -> int:
    """Returns at which step the training of a run ends, for a training split of `num_examples`."""
    training = config.training
    return training.steps or max(1, round(training.epochs * (num_examples / training.batch_size)))


def complete(workdir: pathlib.Path, step: int, total: int) -> str:
    """Returns what is printed about a run that has no step left to make."""
    if step == total:
        return f"training is complete: {workdir} holds step {step} of {total}"
    return (
        f"nothing to train: {workdir} holds step {step}, and the plan now ends at step {total}; what was trained is "
        "kept, a longer plan goes on from there, and a shorter run needs another --workdir"
    )
