"""Keeps small images decoded in memory, because most of the work would be reading and decoding them every time."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hga_flax.images.bad_images import BadImage

CHUNK = 1024  # examples read at once, because array_record files decompress neighbours together


class MemorySource:
    """All examples of a source, decoded and resized.

    Args:
        source: the source, read once.
        transform: (image, index, epoch) -> uint8 image of `shape`, the same in every epoch.
        shape: (H, W, C) of an image.

    Attributes:
        original: the source.
    """

    def __init__(self, source: Any, transform: Callable, shape: tuple[int, int, int]):
        self.original, count = source, len(source)
        self._images = np.zeros((count, *shape), np.uint8)
        self._labels = np.zeros(count, np.int32)
        self._bad: set[int] = set()
        for start in range(0, count, CHUNK):
            rows = range(start, min(start + CHUNK, count))
            many = source.__getitems__(list(rows)) if hasattr(source, "__getitems__") else map(source.__getitem__, rows)
            for index, record in zip(rows, many, strict=True):
                self._labels[index] = record["label"]
                try:
                    self._images[index] = transform(record["image"], index, 0)
                except BadImage:
                    self._bad.add(index)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns an example with its image as an array, or as empty bytes if it could not be decoded."""
        if index in self._bad:
            return {"image": b"", "label": 0}
        return {"image": self._images[index], "label": self._labels[index]}

    def gather(self, indices: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray] | None:
        """Returns the images, labels and `more` of many examples as a batch, or None if one could not be decoded."""
        if not self._bad.isdisjoint(indices.tolist()):
            return None
        none_bad = np.full(len(indices), -1, np.int32)
        return {"image": self._images[indices], "label": self._labels[indices], "bad": none_bad, **more}


class GatheredBatches:
    """Whole batches of a split in memory. Gathering a batch at once is five times as fast as image by image.

    Args:
        examples: has `read(row)`, which returns an example, and `gather(rows)`, which returns a batch or None.
        size: examples per batch.
        gather: whether to gather batches; False if images are changed on the host, so that each must be read by itself.
    """

    def __init__(self, examples: Any, size: int, *, gather: bool):
        self._examples, self._size, self._gather = examples, size, gather

    def __len__(self) -> int:
        return len(self._examples) // self._size

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        rows = range(batch * self._size, (batch + 1) * self._size)
        if self._gather and (gathered := self._examples.gather(rows)):
            return gathered
        examples = [self._examples.read(row) for row in rows]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def in_memory(source: Any, transform: Callable, shape: tuple[int, int, int], megabytes: float) -> Any:
    """Returns the source, read into memory if its images take at most `megabytes`."""
    small = len(source) * int(np.prod(shape)) <= megabytes * 1e6
    return MemorySource(source, transform, shape) if small else source
