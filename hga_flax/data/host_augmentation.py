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

from hga_flax.data.bad_images import BadImage
from hga_flax.data.jpeg import jpeg_size
from hga_flax.errors import one_line

cv2.setNumThreads(0)  # the loader's threads are enough; OpenCV's own would fight them for the cores
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # bad images are named by bad_images.py, once

DECODE_FLAGS = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}
REDUCTION_FLAGS = {n: flag for n, flag in ((1, 0), (2, 16), (4, 32), (8, 64))}  # of IMREAD_REDUCED_*
# Box averaging followed by these taps has the width of the antialiased bilinear filter (Pillow's):
# its variance is 1/6 of a pixel, the box's 1/12.
TAPS = np.array([1 / 24, 22 / 24, 1 / 24])
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10


def decode(image: bytes | np.ndarray, channels: int, reduction: int = 1) -> np.ndarray:
    """Decodes an image to uint8 `[H, W, channels]`, upright as its EXIF says; arrays pass through.

    The content decides the format, whatever the file is called; 16 bits become 8, CMYK becomes RGB,
    transparency is dropped, of an animation the first frame counts.

    Args:
        image: the encoded image, or an array.
        channels: 1 or 3.
        reduction: 1, 2, 4 or 8: decode to height and width divided by this (JPEG does so much faster).

    Raises:
        BadImage: the bytes are no image that OpenCV reads, or not a whole one.
    """
    if isinstance(image, np.ndarray):
        return image
    if not image:
        raise BadImage("the file is empty or cannot be read")
    # A JPEG ends with a marker that its data cannot hold: older decoders fill what is missing with grey.
    if image[:2] == b"\xff\xd8" and image[-2:] != b"\xff\xd9" and image.rfind(b"\xff\xd9") < image.rfind(b"\xff\xda"):
        raise BadImage(f"the JPEG of {len(image)} bytes is cut off")
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), DECODE_FLAGS[channels] | REDUCTION_FLAGS[reduction])
    except cv2.error as error:
        raise BadImage(f"the image of {len(image)} bytes cannot be decoded ({one_line(error.err)})") from None
    if pixels is None:
        raise BadImage(f"the image of {len(image)} bytes cannot be decoded")
    return pixels[:, :, None] if channels == 1 else pixels


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 `[H, W, C]` by area averaging where it shrinks, bilinearly where it grows."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized.reshape(height, width, image.shape[2])


def central_crop(image: np.ndarray, size: int, fraction: float) -> np.ndarray:
    """Resizes the short side to `size / fraction` and cuts out the centre: uint8 `[size, size, C]`.

    Shrinking is antialiased bilinear, as Pillow's and torchvision's, to a fraction of a grey level.
    """
    height, width = image.shape[:2]
    scale = round(size / fraction) / min(height, width)
    image = resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    if scale < 1:
        image = cv2.sepFilter2D(image, -1, TAPS, TAPS, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)
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


def decode_for_crop(image: bytes | np.ndarray, channels: int, size: int, key: tuple[int, ...]) -> tuple:
    """Decodes for `random_warp`, at reduced scale where the crop that it will draw stays large enough.

    Returns:
        The image and the (height, width) of the whole one.
    """
    whole = jpeg_size(image) if isinstance(image, bytes) else None
    if whole is None or min(whole) < 2 * size:
        pixels = decode(image, channels)
        return pixels, pixels.shape[:2]
    crop = min(random_crop_box(np.random.default_rng(key), *whole)[2:])
    return decode(image, channels, max(n for n in REDUCTION_FLAGS if n == 1 or crop >= n * size)), whole


def random_warp(
    image: np.ndarray,
    size: int,
    flip: bool,
    rotation_degrees: float,
    key: tuple[int, ...],
    whole: tuple[int, int] | None = None,
) -> np.ndarray:
    """Random crop, flip and rotation in one warp: uint8 `[H, W, C]` -> `[size, size, C]`.

    Args:
        image: the decoded image.
        size: height and width of the result.
        flip: mirror half of the images.
        rotation_degrees: rotate by an angle uniform in +- this many degrees about the crop's centre.
        key: integers that all random choices derive from.
        whole: (height, width) before decoding at reduced scale.
    """
    random = np.random.default_rng(key)
    height, width = whole or image.shape[:2]
    top, left, crop_height, crop_width = random_crop_box(random, height, width)
    scale = min(crop_height * image.shape[0] / height, crop_width * image.shape[1] / width) / size
    if scale >= 2:  # the warp looks at 2x2 pixels: average first
        small = (max(1, image.shape[1] // int(scale)), max(1, image.shape[0] // int(scale)))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA).reshape(*small[::-1], image.shape[2])
    down_y, down_x = image.shape[0] / height, image.shape[1] / width
    top, crop_height, left, crop_width = top * down_y, crop_height * down_y, left * down_x, crop_width * down_x
    angle = math.radians(random.uniform(-rotation_degrees, rotation_degrees))
    mirror = -1.0 if flip and random.random() < 0.5 else 1.0
    # From output pixel to input pixel: centre, mirror, scale to the crop, rotate, move to its centre.
    scale_x, scale_y = mirror * crop_width / size, crop_height / size
    a, b = math.cos(angle) * scale_x, -math.sin(angle) * scale_y
    c, d = math.sin(angle) * scale_x, math.cos(angle) * scale_y
    middle = (size - 1) / 2
    x = left + crop_width / 2 - 0.5 - (a + b) * middle
    y = top + crop_height / 2 - 0.5 - (c + d) * middle
    matrix = np.array([[a, b, x], [c, d, y]])
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
        if data.augmentation != "imagenet":
            return resize(decode(image, channels), size, size)
        if not train:
            return central_crop(decode(image, channels), size, data.eval_crop_fraction)
        key = (seed, epoch, index)
        pixels, whole = decode_for_crop(image, channels, size, key)
        return random_warp(pixels, size, data.flip, data.rotation_degrees, key, whole)

    return transform
