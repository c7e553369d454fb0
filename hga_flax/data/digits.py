"""The built-in data set: scikit-learn's handwritten digits as a TFDS data set.

1,797 real 8x8 grey images in 10 classes (UCI Optical Recognition of Handwritten Digits, Alpaydin
and Kaynak 1998), split by class into 1,500 for training and 297 for testing. They are written as
array_record files of PNGs, so that the demo takes the same path through the code as ImageNet.
"""

import contextlib
import io
import pathlib
from collections.abc import Iterator

import cv2
import numpy as np
import tensorflow_datasets as tfds

from hga_flax.data.packing import write_once

TEST_EXAMPLES = 297


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's digits, 8x8x1 PNG, splits "train" (1,500) and "test" (297), stratified."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits as scikit-learn ships them.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits  # takes 0.8 s, and only this step needs it
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
        train, test = train_test_split(
            np.arange(len(images)), test_size=TEST_EXAMPLES, stratify=digits.target, random_state=0
        )
        return {
            "train": self._generate_examples(images, digits.target, np.sort(train)),
            "test": self._generate_examples(images, digits.target, np.sort(test)),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Iterator:
        for row in rows:
            # TFDS would need TensorFlow to encode an array.
            png = io.BytesIO(cv2.imencode(".png", images[row])[1].tobytes())
            yield int(row), {"image": png, "label": int(labels[row])}


def prepare_digits(data_dir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the prepared data set, preparing it first if it is missing."""

    def write(scratch: pathlib.Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            Digits(data_dir=str(scratch), file_format="array_record").download_and_prepare()

    return write_once(data_dir, "digits", str(Digits.VERSION), write)
