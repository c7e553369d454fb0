"""Counts images that cannot be decoded, reports each once, and ends the run if there are too many.

decoding.py raises `BadImage` for them; data/pipeline.py replaces them by other images.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from hga_flax.errors import UserError

# Values of "bad" in a batch if the loader found no good image; "index" is then the index of the first bad one.
TOO_MANY, NONE_GOOD = -2, -3


class BadImage(UserError, ValueError):
    """The bytes are not a complete image; the message says why."""


class BadImages:
    """The undecodable images that this process has seen.

    Args:
        limit: `data.max_bad_images`, the most that a split may have.
    """

    def __init__(self, limit: int):
        self._limit, self._found = limit, {}
        self.log: Callable[[str], None] = lambda line: print(line, file=sys.stderr)

    def found(self, split: str) -> list[int]:
        """Returns the sorted indices of a split's bad images."""
        return sorted(self._found.get(split, ()))

    def remember(self, split: str, indices: Iterable[int]) -> None:
        """Adds images that an earlier session has already reported."""
        self._found.setdefault(split, set()).update(indices)

    def share(self, split: str, indices: Iterable[int]) -> None:
        """Adds the images that all processes have seen.

        Raises:
            UserError: the total exceeds the limit.
        """
        self.remember(split, indices)
        if len(self._found[split]) > self._limit:
            raise self._too_many(split)

    def watch(
        self, batches: Iterator[dict[str, Any]], split: str, explain: Callable[[int], str]
    ) -> Iterator[dict[str, Any]]:
        """Yields the batches without their "bad": the index of a bad example, or -1 for a good one.

        Args:
            batches: batches from the loader.
            split: the split that they come from.
            explain: maps the index of a bad image to its name and what is wrong with it.

        Raises:
            UserError: there are more bad images than the limit, or no good ones.
        """
        found = self._found.setdefault(split, set())
        for batch in batches:
            bad = batch.pop("bad")
            for index in np.unique(bad[bad >= 0]).tolist():
                if index not in found:
                    found.add(index)
                    self.log(f"skipped {explain(index)}")
                if len(found) > self._limit:  # also of images that an earlier pass has found
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
            "repair or remove them (those that this process has seen are named above), or raise the limit"
        )
