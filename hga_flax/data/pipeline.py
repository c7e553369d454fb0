"""Makes batches of a source with Grain: ordered, sharded by process, resumable at any step.

An undecodable image does not shift the others: training replaces it by the next good image of the global order,
evaluation by a blank image that does not count.
"""

import dataclasses
import functools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import joblib
import numpy as np

from hga_flax.data.classes import labelled
from hga_flax.data.folder import FolderSource
from hga_flax.data.memory import GatheredBatches, MemorySource, in_memory
from hga_flax.data.sources import DatasetInfo, Source, SyntheticSource, dataset_info, open_source
from hga_flax.data.streams import PERMUTATION, epoch_order
from hga_flax.data.workers import in_workers
from hga_flax.images.bad_images import NONE_GOOD, TOO_MANY, BadImage, BadImages
from hga_flax.images.host_augmentation import host_transform

# (image, index of the example, epoch, array for the result or None) -> uint8 [H, W, C]
Transform = Callable[[Any, int, int, np.ndarray | None], np.ndarray]
Batch = dict[str, np.ndarray]
CHUNK = 16  # most examples that a thread reads at a time


@dataclasses.dataclass(frozen=True)
class Shard:
    """This process's place among all processes that feed the same global batch."""

    process: int = 0
    processes: int = 1

    def position(self, row: int, batch_size: int) -> int:
        """Returns the global position of this process's `row`; `batch_size` is the global one."""
        local = batch_size // self.processes
        batch, offset = divmod(row, local)
        return batch * batch_size + self.process * local + offset


class _TrainExamples:
    """This process's rows of the endless global order, as a random-access source for Grain.

    Global position g is the g-th example of all epochs in sequence, each in its own order. Batch k holds the
    positions k * B .. (k + 1) * B - 1, and process p of P gets its p-th contiguous part. So the contents of
    a batch depend neither on P nor on where a run was interrupted.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        blank: np.ndarray,
        max_bad: int,
        seed: int,
        batch_size: int,
        shard: Shard,
        start: int,
        shuffled: str = PERMUTATION,
    ):
        self._source, self._transform, self._shard, self._start = source, transform, shard, start
        self._batch, self._shuffled = batch_size, shuffled
        self._blank, self._max_bad, self._seed = blank, max_bad, seed
        self._orders: dict[int, Callable[[int], int]] = {}  # by epoch

    def __len__(self) -> int:
        return 2**31  # more than any run reads; Grain needs a length

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.read(row)

    def read(self, row: int, out: np.ndarray | None = None) -> dict[str, Any]:
        """Returns the example of a row; writes its image to `out` if that saves a copy."""
        position = self._position(row)
        bad: list[int] = []
        while True:
            epoch, index = self._place(position)
            try:
                record = self._source[index]
                image = self._transform(record["image"], index, epoch, out)
                # Only the first bad image is reported here; the others are reported at their own positions.
                first = bad[0] if bad else -1
                return _example(image, record["label"], first, index=np.int32(index), epoch=np.int32(epoch))
            except BadImage:
                if index not in bad:
                    bad.append(index)
            if len(bad) > self._max_bad or len(bad) == len(self._source):
                why = TOO_MANY if len(bad) > self._max_bad else NONE_GOOD
                return _example(self._blank, 0, why, index=np.int32(bad[0]), epoch=np.int32(epoch))
            position += 1

    def gather(self, rows: Sequence[int]) -> Batch | None:
        """Returns the examples of rows as one batch, or None if an image among them is broken."""
        epochs, indices = np.array([self._place(self._position(row)) for row in rows], np.int32).T
        return self._source.gather(indices, index=indices, epoch=epochs)

    def _position(self, row: int) -> int:
        return self._start + self._shard.position(row, self._batch)

    def _place(self, position: int) -> tuple[int, int]:
        """Returns the epoch and the index of the example at a global position."""
        count = len(self._source)
        epoch, place = divmod(position, count)
        order = self._orders.get(epoch)
        if order is None:
            self._orders.pop(epoch - 2, None)
            order = self._orders[epoch] = epoch_order(self._seed, epoch, count, self._shuffled)
        return epoch, order(place)


class _EvalExamples:
    """This process's rows of an evaluation: every example once, then padding with mask 0."""

    def __init__(self, source: Source, transform: Transform, blank: np.ndarray, batch_size: int, shard: Shard):
        self._source, self._transform, self._blank, self._shard = source, transform, blank, shard
        self._batch, self._local = batch_size, batch_size // shard.processes

    def __len__(self) -> int:
        return math.ceil(len(self._source) / self._batch) * self._local

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.read(row)

    def read(self, row: int, out: np.ndarray | None = None) -> dict[str, Any]:
        """Returns the example of a row; writes its image to `out` if that saves a copy."""
        position = self._shard.position(row, self._batch)
        if position >= len(self._source):
            return _example(self._blank, 0, -1, mask=np.bool_(False))
        try:
            record = self._source[position]
            image = self._transform(record["image"], position, 0, out)
        except BadImage:
            return _example(self._blank, 0, position, mask=np.bool_(False))
        return _example(image, record["label"], -1, mask=np.bool_(True))

    def gather(self, rows: Sequence[int]) -> Batch | None:
        """Returns the examples of rows as one batch, or None if an image among them is broken or one is padding."""
        indices = np.array([self._shard.position(row, self._batch) for row in rows])
        if indices.max() >= len(self._source):
            return None
        return self._source.gather(indices, mask=np.ones(len(indices), bool))


def _example(image: np.ndarray, label: int, bad: int, **more: Any) -> dict[str, Any]:
    return {"image": image, "label": np.int32(label), "bad": np.int32(bad), **more}


def available_cores() -> int:
    """Returns the number of cores that this process may use, by its affinity and its container's quota."""
    return joblib.cpu_count()


def _batches(
    examples: Any, batch_size: int, image_shape: tuple[int, int, int], data: Any, memory: bool, train: bool
) -> Iterator[Batch]:
    threads, workers = data.num_threads, data.num_workers
    if memory:
        # This work holds the GIL, so more threads only contend (9 times slower on 28x28 images). One thread makes whole
        # batches in advance.
        options = grain.ReadOptions(num_threads=min(threads, 1), prefetch_buffer_size=2 if threads else 0)
        gather = not (train and data.randaugment_ops)  # RandAugment changes images one by one, on the host
        return iter(
            grain.MapDataset.source(GatheredBatches(examples, batch_size, gather=gather)).to_iter_dataset(options)
        )
    dataset = grain.MapDataset.source(examples)
    if workers:
        return in_workers(dataset.batch(batch_size), workers)
    # More threads than cores only contend for the GIL: 16 on 2 cores read half as many images per second.
    threads = min(threads, available_cores())
    # A thread takes several examples at a time, because Grain's overhead per element is a tenth of a JPEG's decoding.
    chunk = max(n for n in range(1, CHUNK + 1) if batch_size % n == 0)
    # Prefetch enough to keep the threads busy across a batch boundary, but not more, to save memory.
    ahead = max(2 * batch_size // chunk, 2 * threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    chunks = grain.MapDataset.source(_Chunks(examples, chunk, batch_size, image_shape)).to_iter_dataset(options)
    return iter(chunks.batch(batch_size // chunk, batch_fn=_join))


class _Chunks:
    """Examples in chunks of `size`; images are written directly to their batch's array, so joining copies none."""

    def __init__(self, examples: Any, size: int, batch_size: int, image_shape: tuple[int, int, int]):
        self._examples, self._size, self._batch, self._shape = examples, size, batch_size, image_shape
        self._lock = threading.Lock()
        self._images: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()  # by batch

    def __len__(self) -> int:
        return len(self._examples) // self._size

    def __getitem__(self, chunk: int) -> Batch:
        batch, first = divmod(chunk * self._size, self._batch)
        images = self._images_of(batch)[first : first + self._size]
        examples = [self._examples.read(chunk * self._size + i, image) for i, image in enumerate(images)]
        for image, example in zip(images, examples, strict=True):
            if example["image"] is not image:
                image[...] = example["image"]
        return {name: np.array([e[name] for e in examples]) for name in examples[0] if name != "image"} | {
            "image": images
        }

    def _images_of(self, batch: int) -> np.ndarray:
        # The first chunk of a batch makes the array; the chunks that are ready keep it alive.
        with self._lock:
            images = self._images.get(batch)
            if images is None:
                images = self._images[batch] = np.empty((self._batch, *self._shape), np.uint8)
        return images


def _join(chunks: Sequence[Batch]) -> Batch:
    """Joins the chunks of a batch."""
    batch = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0] if name != "image"}
    return {"image": chunks[0]["image"].base, **batch}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as training and evaluation use it; `create_dataset` makes it from a `config.data`.

    Attributes:
        info: the data set's classes and channels.
        data: `config.data`.
        seed: seed of the order and the augmentation.
        eval_size: height and width of the images in evaluation; 0: `data.image_size`.
    """

    info: DatasetInfo
    data: Any
    seed: int
    eval_size: int = 0

    @functools.cached_property
    def bad_images(self) -> BadImages:
        """The undecodable images that this process has seen."""
        return BadImages(self.data.max_bad_images)

    @functools.cached_property
    def _opened(self) -> dict[str, Source]:
        return {}

    def open(self, split: str) -> Source:
        """Opens a split, or with `data.fake` a synthetic one; opens each only once, and reads no images.

        Raises:
            UserError: the split does not exist or is empty.
        """
        data = self.data
        if split not in self._opened:
            key = {data.eval_split: "data.eval_split", data.train_split: "data.train_split"}.get(split, "--split")
            if data.fake:
                self._opened[split] = SyntheticSource(data.fake_examples, data.image_size, self.info)
            else:
                self._opened[split] = open_source(self.info.name, split, data.dir, key, self.info)
                if changed := self.info.changed(self.described([split])):
                    print(f"warning: {changed[0]}: its errors cannot be compared with the run's own", file=sys.stderr)
        return self._opened[split]

    def described(self, splits: Sequence[str] = ()) -> DatasetInfo:
        """Returns `info` with the sizes and digests of these splits; by default, training's and evaluation's."""
        splits = splits or (self.data.train_split, self.data.eval_split)
        sizes = {split: len(self.open(split)) for split in splits}
        opened = {split: self._opened[split] for split in splits}
        digests = {split: source.digest for split, source in opened.items() if isinstance(source, FolderSource)}
        return dataclasses.replace(self.info, num_examples=sizes, digests=digests)

    def source(self, split: str, *, train: bool = True) -> Source:
        """Opens a split for training or evaluation; a small one is read into memory at the image size of that use."""
        data, source = self.data, self.open(split)
        if data.augmentation == "imagenet" or data.num_workers:
            return source
        shape = self._image_shape(train)
        # With train=False it only resizes, which is the same in every epoch.
        transform = host_transform(data, self.info.channels, train=False, seed=self.seed, size=shape[0])
        return in_memory(source, transform, shape, data.cache_mb)

    def _image_shape(self, train: bool) -> tuple[int, int, int]:
        size = self.data.image_size if train else self.eval_size or self.data.image_size
        return size, size, self.info.channels

    def train_batches(
        self, source: Source, batch_size: int, shard: Shard, start: int = 0, shuffled: str = PERMUTATION
    ) -> Iterator[Batch]:
        """Yields this process's part of each global batch, endlessly.

        Args:
            source: the result of `source(data.train_split)`.
            batch_size: size of the global batch; a multiple of the number of processes.
            shard: this process's place among the processes.
            start: number of examples of the global order that were already used.
            shuffled: `PERMUTATION`, or `CIPHER` for a run that began with it.

        Yields:
            `image` uint8 `[b, H, W, C]`, `label`, `index` and `epoch` int32 `[b]`.
        """
        blank = np.zeros(self._image_shape(True), np.uint8)
        examples = lambda source, transform: _TrainExamples(
            source, transform, blank, self.data.max_bad_images, self.seed, batch_size, shard, start, shuffled
        )
        return self._batches(source, self.data.train_split, True, examples, batch_size // shard.processes)

    def eval_batches(self, source: Source, batch_size: int, shard: Shard, split: str | None = None) -> Iterator[Batch]:
        """Yields this process's part of an evaluation; every process gets the same number of batches.

        Args:
            source: the result of `source(split, train=False)`.
            batch_size: size of the global batch; a multiple of the number of processes.
            shard: this process's place among the processes.
            split: the split of `source`, under which bad images are counted; None: `data.eval_split`.

        Yields:
            `image` uint8 `[b, H, W, C]`, `label` int32 `[b]`, `mask` bool `[b]`, false for rows that do not count.
        """
        blank = np.zeros(self._image_shape(False), np.uint8)
        examples = lambda source, transform: _EvalExamples(source, transform, blank, batch_size, shard)
        split = split or self.data.eval_split
        return self._batches(source, split, False, examples, batch_size // shard.processes)

    def _batches(self, source: Source, split: str, train: bool, examples: Callable, batch_size: int) -> Iterator[Batch]:
        data, shape = self.data, self._image_shape(train)
        transform = host_transform(data, self.info.channels, train=train, seed=self.seed, size=shape[0])
        memory = isinstance(source, MemorySource)
        batches = _batches(examples(source, transform), batch_size, shape, data, memory, train)
        watched = self.bad_images.watch(batches, split, lambda index: _explain(source, transform, index))
        return labelled(watched, self.info.num_classes, split)


def _explain(source: Source, transform: Transform, index: int) -> str:
    """Returns the name of an undecodable image and the reason."""
    name = f"example {index}"
    try:
        record = (source.original if isinstance(source, MemorySource) else source)[index]
        file = record.get("file_name", name)
        name = file.decode(errors="replace") if isinstance(file, bytes) else str(file)
        transform(record["image"], index, 0)
    except BadImage as error:
        return f"{name}: {error}"
    return f"{name}: it could not be decoded before, but can be now"


def create_dataset(data: Any, seed: int) -> Dataset:
    """Returns the data set that a `config.data` names.

    Raises:
        UserError: the data set does not exist.
    """
    return Dataset(dataset_info(data.name, data.dir), data, seed)
