"""From a source to batches, with Grain: ordered, sharded by process, resumable at any step."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from hga_flax.data.host_augmentation import host_transform
from hga_flax.data.sources import DatasetInfo, Source, SyntheticSource, dataset_info, open_source

# (image, index of the example, epoch) -> uint8 [H, W, C]
Transform = Callable[[Any, int, int], np.ndarray]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shard:
    """This process's place among all that feed the same global batch."""

    process: int = 0
    processes: int = 1


class _TrainExamples:
    """This process's rows of the endless global order, as a random-access source for Grain.

    Global position g is the g-th example of all epochs, each epoch shuffled anew; batch k holds the
    positions k * B .. (k + 1) * B - 1 and process p of P its p-th contiguous part. So neither P nor
    the place where a run was cut changes what any batch holds.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, batch_size: int, shard: Shard, start: int):
        self._source, self._transform, self._shard, self._start = source, transform, shard, start
        self._batch, self._local = batch_size, batch_size // shard.processes
        self._order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()

    def __len__(self) -> int:
        return 2**31  # more than any run reads; Grain needs a number

    def __getitem__(self, row: int) -> dict[str, Any]:
        batch, offset = divmod(row, self._local)
        position = self._start + batch * self._batch + self._shard.process * self._local + offset
        epoch, index = position // len(self._source), int(self._order[position])
        record = self._source[index]
        return {
            "image": self._transform(record["image"], index, epoch),
            "label": np.int32(record["label"]),
            "index": np.int32(index),
            "epoch": np.int32(epoch),
        }


class _EvalExamples:
    """This process's rows of an evaluation: every example once, then padding with mask 0."""

    def __init__(self, source: Source, transform: Transform, batch_size: int, shard: Shard):
        self._source, self._transform, self._shard = source, transform, shard
        self._batch, self._local = batch_size, batch_size // shard.processes

    def __len__(self) -> int:
        return math.ceil(len(self._source) / self._batch) * self._local

    def __getitem__(self, row: int) -> dict[str, Any]:
        batch, offset = divmod(row, self._local)
        position = batch * self._batch + self._shard.process * self._local + offset
        real = position < len(self._source)
        record = self._source[position if real else 0]
        return {
            "image": self._transform(record["image"], position, 0),
            "label": np.int32(record["label"]),
            "mask": np.bool_(real),
        }


def _batches(examples: Any, batch_size: int, threads: int) -> Iterator[Batch]:
    # Enough examples ahead to keep the threads busy over a batch boundary, not more: memory.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * batch_size, 16) if threads else 0)
    return iter(grain.MapDataset.source(examples).to_iter_dataset(options).batch(batch_size))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as training and evaluation see it, made by `create_dataset` from a `config.data`."""

    info: DatasetInfo
    data: Any
    seed: int

    def source(self, split: str) -> Source:
        """Opens a split: the real one, or a synthetic one with `data.fake`."""
        if self.data.fake:
            return SyntheticSource(self.data.fake_examples, self.data.image_size, self.info)
        return open_source(self.info.name, split, self.data.dir)

    def train_batches(self, source: Source, batch_size: int, shard: Shard, start: int = 0) -> Iterator[Batch]:
        """Yields this process's part of each global batch, without end.

        Args:
            source: as `source(data.train_split)` returns it.
            batch_size: of the global batch; a multiple of the number of processes.
            shard: this process's place.
            start: number of examples of the global order that were consumed before.

        Yields:
            `image` uint8 `[b, H, W, C]`, `label`, `index` and `epoch` int32 `[b]`.
        """
        transform = host_transform(self.data, self.info.channels, True, self.seed)
        examples = _TrainExamples(source, transform, self.seed, batch_size, shard, start)
        return _batches(examples, batch_size // shard.processes, self.data.num_threads)

    def eval_batches(self, source: Source, batch_size: int, shard: Shard) -> Iterator[Batch]:
        """Yields this process's part of an evaluation; every process gets equally many batches.

        Yields:
            `image` uint8 `[b, H, W, C]`, `label` int32 `[b]`, `mask` bool `[b]`, false for padding.
        """
        transform = host_transform(self.data, self.info.channels, False, self.seed)
        examples = _EvalExamples(source, transform, batch_size, shard)
        return _batches(examples, batch_size // shard.processes, self.data.num_threads)


def create_dataset(data: Any, seed: int) -> Dataset:
    """Returns the data set that a `config.data` names.

    Raises:
        UserError: the data set does not exist.
    """
    return Dataset(dataset_info(data.name, data.dir), data, seed)
