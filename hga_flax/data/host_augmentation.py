"""What is done to one image on the host: decoding, and for large images the crop to the input size.

Training on large images takes one affine warp that composes the random resized crop (8-100 % of
the area, aspect 3/4 to 4/3), the flip and the rotation (SENet's recipe, https://arxiv.org/abs/1709.01507,
section 5.1, whose released settings are +-10 degrees). Every random choice is drawn from
(seed, epoch, index), so neither threads nor hosts change it.
"""

import math
from typing import Any

import cv2
import numpy as np

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10


def decode(image: bytes | np.ndarray, channels: int) -> np.ndarray:
    """Decodes an image to uint8 `[H, W, channels]`; arrays pass through.

    Raises:
        ValueError: the bytes are no image that OpenCV reads.
    """
    if isinstance(image, np.ndarray):
        return image
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flag)
    if pixels is None:
        raise ValueError(f"an image of {len(image)} bytes cannot be decoded")
    return pixels[:, :, None] if channels == 1 else pixels


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 `[H, W, C]` by area averaging where it shrinks, bilinearly where it grows."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized.reshape(height, width, image.shape[2])


def central_crop(image: np.ndarray, size: int, fraction: float) -> np.ndarray:
    """Resizes the short side to `size / fraction` and cuts out the centre: uint8 `[size, size, C]`."""
    height, width = image.shape[:2]
    scale = round(size / fraction) / min(height, width)
    image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_crop_box(random: np.random.Generator, height: int, width: int) -> tuple[float, float, float, float]:
    """Draws (top, left, height, width) of a crop of random area and aspect; the centre if none fits."""
    for _ in range(CROP_TRIES):
        area = random.uniform(*AREA) * height * width
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            top, left = random.uniform(0, height - crop_height), random.uniform(0, width - crop_width)
            return top, left, crop_height, crop_width
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
    return (height - crop_height) / 2, (width - crop_width) / 2, crop_height, crop_width


def random_warp(image: np.ndarray, size: int, flip: bool, rotation_degrees: float, key: tuple[int, ...]) -> np.ndarray:
    """Random crop, flip and rotation in one warp: uint8 `[H, W, C]` -> `[size, size, C]`.

    Args:
        image: the decoded image.
        size: height and width of the result.
        flip: mirror half of the images.
        rotation_degrees: rotate by an angle uniform in +- this many degrees about the crop's centre.
        key: integers that all random choices derive from.
    """
    random = np.random.default_rng(key)
    height, width = image.shape[:2]
    top, left, crop_height, crop_width = random_crop_box(random, height, width)
    angle = math.radians(random.uniform(-rotation_degrees, rotation_degrees))
    mirror = -1.0 if flip and random.random() < 0.5 else 1.0
    # From output pixel to input pixel: centre, mirror, scale to the crop, rotate, move to its centre.
    scale_x, scale_y = mirror * crop_width / size, crop_height / size
    linear = np.array(
        [
            [math.cos(angle) * scale_x, -math.sin(angle) * scale_y],
            [math.sin(angle) * scale_x, math.cos(angle) * scale_y],
        ]
    )
    centre = np.array([left + crop_width / 2 - 0.5, top + crop_height / 2 - 0.5])
    offset = centre - linear @ np.full(2, (size - 1) / 2)
    matrix = np.concatenate([linear, offset[:, None]], axis=1)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return warped.reshape(size, size, image.shape[2])


def host_transform(data: Any, channels: int, train: bool, seed: int) -> Any:
    """Returns `transform(image, index, epoch) -> uint8 [size, size, channels]` for a `config.data`.

    `data.augmentation` "imagenet" crops here; "small" and "none" resize the whole image ("small"
    is augmented on the device, see `device_augmentation.py`).
    """
    size = data.image_size

    def transform(image: bytes | np.ndarray, index: int, epoch: int) -> np.ndarray:
        pixels = decode(image, channels)
        if data.augmentation != "imagenet":
            return resize(pixels, size, size)
        if train:
            return random_warp(pixels, size, data.flip, data.rotation_degrees, (seed, epoch, index))
        return central_crop(pixels, size, data.eval_crop_fraction)

    return transform
