"""Compares the classes of a data set with those that a run was trained on."""

from collections.abc import Sequence

MOST_NAMED = 5  # classes listed in a message


def named(classes: Sequence[str]) -> str:
    """Returns the names in quotes, only the first few if there are many."""
    more = f" and {len(classes) - MOST_NAMED:,} more" if len(classes) > MOST_NAMED else ""
    return ", ".join(f"'{name}'" for name in classes[:MOST_NAMED]) + more


def difference(run: Sequence[str], there: Sequence[str], where: str) -> str | None:
    """Returns a sentence on how a data set's classes differ from a run's; None if they are the same, in the same order.

    Args:
        run: the run's class names, by label.
        there: the data set's class names, by label.
        where: what the sentence calls the data set.
    """
    if tuple(run) == tuple(there):
        return None
    added, lacking = [c for c in there if c not in set(run)], [c for c in run if c not in set(there)]
    parts = ([f"it adds {named(added)}"] if added else []) + ([f"it lacks {named(lacking)}"] if lacking else [])
    if not parts:
        label = next(i for i, pair in enumerate(zip(run, there, strict=False)) if pair[0] != pair[1])
        parts = [f"they are in another order: label {label} is '{there[label]}' there, in the run '{run[label]}'"]
    return f"{where} has {_classes(len(there))}, the run {len(run):,}: {' and '.join(parts)}"


def _classes(count: int) -> str:
    return f"{count:,} class" if count == 1 else f"{count:,} classes"
