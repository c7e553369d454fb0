"""Compares the classes of a data set with those that a run was trained on, and with the labels of its examples."""

from collections.abc import Iterator, Sequence
from typing import Any

from hga_flax.errors import UserError

MOST_NAMED = 5  # classes listed in a message


def named(classes: Sequence[str]) -> str:
    """Returns the names in quotes, only the first few if there are many."""
    more = f" and {len(classes) - MOST_NAMED:,} more" if len(classes) > MOST_NAMED else ""
    return ", ".join(f"'{name}'" for name in classes[:MOST_NAMED]) + more


def difference(run: Sequence[str], there: Sequence[str], where: str) -> str | None:
    """Returns a sentence on how a data set's classes differ from a run's; None if names and order are the same.

    Args:
        run: the run's class names, by label.
        there: the data set's class names, by label.
        where: the data set's name in the sentence.
    """
    if tuple(run) == tuple(there):
        return None
    ours, theirs = set(run), set(there)
    added, lacking = [c for c in there if c not in ours], [c for c in run if c not in theirs]
    parts = ([f"it adds {named(added)}"] if added else []) + ([f"it lacks {named(lacking)}"] if lacking else [])
    if not parts:
        label = next(i for i, pair in enumerate(zip(run, there, strict=False)) if pair[0] != pair[1])
        parts = [f"they are in another order: label {label} is '{there[label]}' there and '{run[label]}' in the run"]
    return f"{where} has {_classes(len(there))}, the run {len(run):,}: {' and '.join(parts)}"


def _classes(count: int) -> str:
    return f"{count:,} class" if count == 1 else f"{count:,} classes"


def labelled(batches: Iterator[dict[str, Any]], num_classes: int, split: str) -> Iterator[dict[str, Any]]:
    """Yields the batches of a split, which must have labels: TFDS gives the examples of unlabelled splits the label -1.

    Raises:
        UserError: a label is not the number of a class.
    """
    for batch in batches:
        wrong = batch["label"][(batch["label"] < 0) | (batch["label"] >= num_classes)]
        if wrong.size:
            raise UserError(
                f"the split '{split}' has examples with the label {wrong[0]}, which is none of the {num_classes:,} "
                "classes; unlabelled examples cannot be used for training or evaluation"
            )
        yield batch
