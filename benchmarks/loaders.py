"""Other loaders for `bench input --compare`, written in the usual way, for JPEGs in memory.

Both flip, and crop 8-100 % of the area at aspect ratios of 3/4-4/3; only the one with Pillow rotates.
"""

import contextlib
import io
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from hga_flax.images.host_augmentation import AREA, ASPECT, random_crop_box


@contextlib.contextmanager
def tf_data(
    jpegs: list[bytes], size: int, rotation_degrees: float, batch_size: int, cores: int
) -> Iterator[Iterator[Any]]:
    """Loads with tf.data as Flax's ImageNet example does; without rotation, so `rotation_degrees` is ignored."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")

    def load(jpeg: Any) -> Any:
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(jpeg),
            bounding_boxes=tf.zeros((1, 0, 4)),
            area_range=AREA,
            aspect_ratio_range=ASPECT,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.image.resize(tf.io.decode_and_crop_jpeg(jpeg, window, channels=3), (size, size))
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(jpegs).repeat().map(load, num_parallel_calls=cores)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    yield dataset.batch(batch_size).prefetch(1).with_options(options).as_numpy_iterator()


class PillowImages:
    """A torch data set of JPEGs decoded, cropped, flipped and rotated by Pillow."""

    def __init__(self, jpegs: list[bytes], size: int, rotation_degrees: float):
        self._jpegs, self._size, self._degrees = jpegs, size, rotation_degrees

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> np.ndarray:
        from PIL import Image

        image = Image.open(io.BytesIO(self._jpegs[index % len(self._jpegs)])).convert("RGB")
        draws = random.Random(index)
        top, left, height, width = random_crop_box(draws, image.height, image.width)
        box = (left, top, left + width, top + height)
        image = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)
        if draws.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._degrees:
            image = image.rotate(draws.uniform(-self._degrees, self._degrees), Image.Resampling.BILINEAR)
        return np.array(image)


@contextlib.contextmanager
def torch_pillow(
    jpegs: list[bytes], size: int, rotation_degrees: float, batch_size: int, cores: int
) -> Iterator[Iterator[Any]]:
    """Loads with torch's DataLoader, Pillow and one worker process per core."""
    from torch.utils.data import DataLoader

    options = {"num_workers": cores, "multiprocessing_context": "spawn"}
    iterator = iter(DataLoader(PillowImages(jpegs, size, rotation_degrees), batch_size=batch_size, **options))
    try:
        yield iterator
    finally:
        iterator._shutdown_workers()  # now, not at garbage collection: the next measurement needs the cores
