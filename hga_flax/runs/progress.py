"""Progress of a run: the JSON item of its checkpoints, and the message printed when no step is left."""

import dataclasses
import pathlib
from typing import Any

from ml_collections import ConfigDict

from hga_flax.data.streams import CIPHER
from hga_flax.errors import UserError


@dataclasses.dataclass
class Progress:
    """The JSON item that a checkpoint stores next to the state.

    Attributes:
        examples_seen: position in the global order of training examples.
        num_examples: size of the training split, to detect a changed data set.
        best: the best evaluation so far and its `step`, or None.
        elapsed_seconds: training time over all sessions.
        bad_images: indices of the undecodable training images that any process has found so far.
        shuffled: how each epoch is shuffled (data/streams.py); older versions did not record it.
        evaluation_due: a signal cancelled the evaluation planned for this step; the resumed run starts with it.
    """

    examples_seen: int = 0
    num_examples: int = 0
    best: dict[str, float] | None = None
    elapsed_seconds: float = 0.0
    bad_images: list[int] = dataclasses.field(default_factory=list)
    shuffled: str = CIPHER
    evaluation_due: bool = False

    @classmethod
    def restored(cls, run: dict[str, Any]) -> "Progress":
        """Returns the progress stored in a checkpoint."""
        progress = cls(**run)
        if progress.best and progress.best["top1_error"] is None:  # older versions recorded evaluations of zero images
            progress.best = None
        return progress


def check_same_size(then: int, now: int) -> None:
    """Raises a UserError if the training split has another number of examples than when the run started."""
    if then != now:
        raise UserError(
            f"the training split has {now} examples, but this run started with {then}: the data set has changed; "
            "choose another --workdir"
        )


def planned_steps(config: ConfigDict, num_examples: int) -> int:
    """Returns the step at which training ends, for a training split of `num_examples`."""
    training = config.training
    return training.steps or max(1, round(training.epochs * (num_examples / training.batch_size)))


def complete(workdir: str | pathlib.Path, step: int, total: int) -> str:
    """Returns the message for a run that has no steps left."""
    if step == total:
        return f"training is complete: {workdir} holds step {step} of {total}"
    return (
        f"nothing to train: {workdir} holds step {step}, but the plan now ends at step {total}; the training so far "
        "is kept: a longer plan resumes from there, and a shorter run needs another --workdir"
    )
