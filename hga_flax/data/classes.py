"""Comparing the classes of data with those that a run was trained on."""

from collections.abc import Sequence

MOST_NAMED = 5  # classes in a message


def named(classes: Sequence[str]) -> str:
    """Returns the names in quotes, the first few where there are many."""
    more = f" and {len(classes) - MOST_NAMED:,} more" if len(classes) > MOST_NAMED else ""
    return ", ".join(f"'{name}'" for name in classes[:MOST_NAMED]) + more


def difference(run: Sequence[str], there: Sequence[str], where: str) -> str | None:
    """Returns in one sentence how classes differ from those of a run; None where they are the same, in order.

    Args:
        run: the names of the run's classes, by label.
        there: those of the data.
        where: what the sentence calls the data.
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
