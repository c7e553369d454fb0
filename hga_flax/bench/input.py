"""Times the loader alone, and other loaders on the same JPEGs."""

import contextlib
import functools
import importlib.resources
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from ml_collections import ConfigDict

from hga_flax.bench.race import benchmarks_of_others
from hga_flax.data.memory import MemorySource
from hga_flax.data.pipeline import Dataset, Shard, available_cores
from hga_flax.data.sources import DatasetInfo, Source, dataset_info
from hga_flax.errors import UserError
from hga_flax.images.bad_images import BadImage
from hga_flax.images.decoding import decode
from hga_flax.images.host_augmentation import decode_for_crop, draw_crop, resize, warp

BATCH = 64
PHOTOS = 64
EXAMPLES = 1_281_167  # the size of ImageNet's training split; the photographs repeat
PHOTO_SIZE = (500, 375)  # the most common width and height in ImageNet
SAMPLE = 200  # number of images used to measure the shares


class PhotoSource:
    """A training split of 500x375 JPEGs, random crops of the photographs that scikit-learn ships."""

    def __init__(self, count: int = PHOTOS):
        # Not with load_sample_images, which needs Pillow.
        folder = importlib.resources.files("sklearn.datasets.images")
        photos = [decode((folder / name).read_bytes(), 3) for name in ("china.jpg", "flower.jpg")]
        random, self.jpegs = np.random.default_rng(0), []
        for i in range(count):
            photo, scale = photos[i % 2], random.uniform(0.88, 1)
            height, width = int(427 * scale), int(427 * scale * 4 / 3)
            top, left = random.integers(0, 428 - height), random.integers(0, 641 - width)
            cut = cv2.resize(photo[top : top + height, left : left + width], PHOTO_SIZE, interpolation=cv2.INTER_AREA)
            self.jpegs.append(cv2.imencode(".jpg", cut[..., ::-1])[1].tobytes())  # quality 95

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.jpegs[index % len(self.jpegs)], "label": index % 10}


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and its running child processes."""
    total, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):  # exists on Linux only
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def measure(batches: Iterator[Any], batch_size: int, seconds: float) -> tuple[float, float]:
    """Returns images per second, and images per second of CPU time."""
    for _ in range(3):
        next(batches)  # warm up: start threads and processes, fill the buffers
    count, cpu, start = 0, cpu_seconds(), time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    wall = time.perf_counter() - start
    return count / wall, count / max(cpu_seconds() - cpu, 1e-9)


def bench_input(config: ConfigDict, compare: bool, seconds: float, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times the loader of a configuration, and optionally other loaders.

    Args:
        config: a complete configuration.
        compare: also time tf.data and torch with Pillow, on the JPEGs that `data.fake` makes.
        seconds: length of each measurement.
        log: called with a line for each loader that is not installed.

    Returns:
        Rows with `loader`, `images_per_s`, `images_per_s_per_core` (per second of CPU time) and
        `ratio_to_first` (of the latter). The first row is our loader, with the `shares` of its CPU time.

    Raises:
        UserError: the data cannot be used.
    """
    data = config.data
    if compare and not (data.fake and data.augmentation == "imagenet"):
        raise UserError("bench input --compare: needs --config.data.fake=true and data.augmentation='imagenet'")
    fake = data.fake and data.augmentation == "imagenet"
    info = DatasetInfo("photographs", 10, 3, ()) if fake else dataset_info(data.name, data.dir)
    dataset = Dataset(info, data, config.seed)
    source = PhotoSource() if fake else dataset.source(data.train_split)
    cores = available_cores()
    ours = measure(dataset.train_batches(source, BATCH, Shard()), BATCH, seconds)
    rows = [{"loader": "hga_flax"} | _speeds(ours, ours) | {"shares": _shares(dataset, source, ours[1])}]
    if not compare:
        return rows
    loaders = benchmarks_of_others("loaders", "bench input --compare")

    for package, name, batches in (
        ("tensorflow", "tf.data decode_and_crop, no rotation", loaders.tf_data),
        ("torch", "torch DataLoader + Pillow", loaders.torch_pillow),
    ):
        if importlib.util.find_spec(package) is None or (package == "torch" and not importlib.util.find_spec("PIL")):
            log(f"{name}: not installed")
            continue
        with batches(source.jpegs, data.image_size, data.rotation_degrees, BATCH, cores) as iterator:
            rows.append({"loader": name} | _speeds(measure(iterator, BATCH, seconds), ours))
    return rows


def _speeds(speeds: tuple[float, float], first: tuple[float, float]) -> dict[str, float]:
    return {
        "images_per_s": round(speeds[0], 1),
        "images_per_s_per_core": round(speeds[1], 1),
        "ratio_to_first": round(speeds[1] / first[1], 3),
    }


def _shares(dataset: Dataset, source: Source, per_core: float) -> dict[str, float]:
    """Returns the shares of reading, decoding, warping (or resizing) and the rest: ordering and batching."""
    if isinstance(source, MemorySource):
        return {"read": 0.0, "decode": 0.0, "warp": 0.0, "batching": 1.0}
    data, channels, clock = dataset.data, dataset.info.channels, time.thread_time
    reading = decoding = warping = 0.0
    count = 0
    for index in range(min(SAMPLE, len(source))):
        start = clock()
        image = source[index]["image"]
        reading, start = reading + clock() - start, clock()
        if data.augmentation == "imagenet":
            draw = functools.partial(
                draw_crop, flip=data.flip, rotation_degrees=data.rotation_degrees, key=(0, 0, index)
            )
            try:
                pixels, crop, reduction = decode_for_crop(image, channels, data.image_size, draw)
            except BadImage:  # training skips it
                continue
            decoding, start = decoding + clock() - start, clock()
            warp(pixels, data.image_size, crop, reduction)
        else:
            try:
                pixels = decode(image, channels)
            except BadImage:
                continue
            decoding, start = decoding + clock() - start, clock()
            resize(pixels, data.image_size, data.image_size)
        warping, count = warping + clock() - start, count + 1
    seconds = {"read": reading / count, "decode": decoding / count, "warp": warping / count}  # training found some good
    total = max(1 / per_core, sum(seconds.values()))
    shares = {name: spent / total for name, spent in seconds.items()}
    shares["batching"] = 1 - sum(shares.values())
    return {name: round(share, 3) for name, share in shares.items()}
