"""Images that cannot be decoded: counted, each named once, and too many of them end the run."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from hga_flax.errors import UserError

# In a batch's "bad", where the loader gave up looking for a good image; "index" is then that of the first bad one.
TOO_MANY, NONE_GOOD = -2, -3


class BadImage(UserError, ValueError):
    """The bytes are no image, or not a whole one; the message says why."""


class BadImages:
    """What this process has met of them.

    Args:
        limit: of `data.max_bad_images`, for each split.
    """

    def __init__(self, limit: int):
        self._limit, self._found = limit, {}
        self.log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)

    def found(self, split: str) -> list[int]:
        """The indices of the bad images of a split, sorted."""
        return sorted(self._found.get(split, ()))

    def remember(self, split: str, indices: Iterable[int]) -> None:
        """Takes over what an earlier session has met and named."""
        self._found.setdefault(split, set()).update(indices)

    def share(self, split: str, indices: Iterable[int]) -> None:
        """Takes over what all processes together have met.

        Raises:
            UserError: together they are more than the limit.
        """
        self.remember(split, indices)
        if len(self._found[split]) > self._limit:
            raise self._too_many(split)

    def watch(
        self, batches: Iterator[dict[str, Any]], split: str, explain: Callable[[int], str]
    ) -> Iterator[dict[str, Any]]:
        """Yields the batches without their "bad": the index of a bad example, -1 for a good one.

        Args:
            batches: from the loader.
            split: that they come from.
            explain: returns the name of a bad image and what is wrong with it.

        Raises:
            UserError: there are more than the limit.
        """
        found = self._found.setdefault(split, set())
        for batch in batches:
            bad = batch.pop("bad")
            for index in np.unique(bad[bad >= 0]).tolist():
                if index in found:
                    continue
                found.add(index)
                self.log(f"skipped {explain(index)}")
                if len(found) > self._limit:
                    raise self._too_many(split)
            if (bad <= TOO_MANY).any():
                for index in np.unique(batch["index"][bad <= TOO_MANY]).tolist():
                    if index not in found:
                        self.log(f"skipped {explain(index)}")
                raise self._too_many(split) if (bad == TOO_MANY).any() else self._none_good(split)
            yield batch

    def _none_good(self, split: str) -> UserError:
        return UserError(f"no image of the split '{split}' can be decoded; some of them are named above")

    def _too_many(self, split: str) -> UserError:
        return UserError(
            f"more than data.max_bad_images={self._limit} images of the split '{split}' cannot be decoded; "
            "mend or remove them (those that this process has met are named above), or raise the limit"
        )
