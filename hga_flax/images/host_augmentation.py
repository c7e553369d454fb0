"""Processing of one image on the host: resizing, and for large images the crop to the input size.

Training on large images uses one affine warp that combines the random resized crop (8-100 % of the
area, aspect 3/4 to 4/3), the flip and the rotation (SENet's recipe, https://arxiv.org/abs/1709.01507,
section 5.1, whose released settings are +-10 degrees). Every random choice derives from
(seed, epoch, index), so the number of threads and hosts does not change it. RandAugment's
(`randaugment.py`) geometric operations are part of the warp, its other operations follow it.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from hga_flax.images import MAX_PIXELS
from hga_flax.images.bad_images import BadImage
from hga_flax.images.decoding import REDUCTION_FLAGS, check_whole, decode, too_large
from hga_flax.images.jpeg import UPRIGHT, decode_top, read_head
from hga_flax.images.randaugment import Operations, apply_colours, draw_operations

# Box averaging followed by the taps (t, 1 - 2 t, t) is like the antialiased bilinear filter (Pillow's), if
# t = BLUR * (1 - scale**2): the closer the scale is to 1, the less the two filters differ. 1 / 24 would give them the
# same variance; this one brings images closer to Pillow's.
BLUR = 1 / 14
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
LOG_ASPECT = (math.log(ASPECT[0]), math.log(ASPECT[1]))
CROP_TRIES = 10
NOTHING = Operations(None, ())  # no RandAugment
MOST_ENLARGED = 2**22  # pixels of an enlarged image; above this, only the crop is computed
WEIGHTS = 2048  # scale of OpenCV's fixed-point weights: 11 bits


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 `[H, W, C]`: area averaging along a side that shrinks, else bilinear interpolation."""
    channels = image.shape[2]
    # OpenCV averages areas only if no side is enlarged, so the sides that shrink do so first.
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    if smaller != image.shape[:2]:
        image = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA)
    if (height, width) != smaller:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image.reshape(height, width, channels)


def central_crop(image: np.ndarray, size: int, fraction: float) -> np.ndarray:
    """Resizes the short side to `size / fraction` and crops the centre: uint8 `[size, size, C]`.

    Shrinking imitates the antialiased bilinear filter of Pillow and torchvision. On photographs, the difference is 0.2
    to 1.3 grey levels in the mean, most at a scale of about 0.6, and up to 20 in single pixels.
    """
    scale = round(size / fraction) / min(image.shape[:2])
    height, width = (max(size, round(side * scale)) for side in image.shape[:2])
    top, left = (height - size) // 2, (width - size) // 2
    if scale > 1 and height * width > MOST_ENLARGED:  # enlarging 3000x1 pixels would take 600 MB
        return enlarged_part(image, (height, width), (top, left), size)
    image = resize(image, height, width)
    if scale < 1:
        share = BLUR * (1 - scale**2)
        taps = np.array([share, 1 - 2 * share, share])
        image = cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)
    return image[top : top + size, left : left + size]


def enlarged_part(image: np.ndarray, shape: tuple[int, int], corner: tuple[int, int], size: int) -> np.ndarray:
    """Returns a part of what `resize` would return, pixel for pixel, without computing the rest.

    Args:
        image: uint8 `[h, w, C]`.
        shape: (height, width) of the whole enlarged image.
        corner: (top, left) of the part.
        size: height and width of the part.

    Returns:
        uint8 `[size, size, C]`.
    """

    def neighbours(axis: int) -> tuple[np.ndarray, ...]:
        """Returns the two lines of the image around each line of the part, and their weights."""
        number, step = image.shape[axis], 1 / (shape[axis] / image.shape[axis])
        place = ((np.arange(corner[axis], corner[axis] + size) + 0.5) * step - 0.5).astype(np.float32)
        first = np.floor(place).astype(np.int32)
        share = place - first.astype(np.float32)
        if axis == 1:  # at the border, OpenCV sets the weights of columns, but not those of rows
            share[(first < 0) | (first >= number - 1)] = 0
            first = first.clip(0, number - 1)
        weights = [np.rint(part * np.float32(WEIGHTS)).astype(np.int32) for part in (1 - share, share)]
        return first.clip(0, number - 1), (first + 1).clip(0, number - 1), *weights

    above, below, above_weight, below_weight = neighbours(0)
    left, right, left_weight, right_weight = neighbours(1)

    def across(rows: np.ndarray) -> np.ndarray:
        pixels = lambda columns: image[rows[:, None], columns].astype(np.int32)
        return pixels(left) * left_weight[:, None] + pixels(right) * right_weight[:, None]

    down = lambda rows, weight: (weight[:, None, None] * (across(rows) >> 4)) >> 16
    return ((down(above, above_weight) + down(below, below_weight) + 2) >> 2).astype(np.uint8)


def random_crop_box(draws: random.Random, height: int, width: int) -> tuple[float, float, float, float]:
    """Draws (top, left, height, width) of a crop with random area and aspect ratio; a centre crop if none fits."""
    for _ in range(CROP_TRIES):
        area = draws.uniform(*AREA) * height * width
        aspect = math.exp(draws.uniform(*LOG_ASPECT))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            top, left = draws.uniform(0, height - crop_height), draws.uniform(0, width - crop_width)
            return top, left, crop_height, crop_width
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
    return (height - crop_height) / 2, (width - crop_width) / 2, crop_height, crop_width


class Crop(NamedTuple):
    """One random crop of an image, in pixels of the whole image.

    Attributes:
        top, left, height, width: the box.
        angle: rotation of the box about its centre, in radians.
        mirror: -1 to mirror the result, else 1.
        distortion: matrix of RandAugment's geometric operations, see `Operations.matrix`; None for the identity.
    """

    top: float
    left: float
    height: float
    width: float
    angle: float
    mirror: float
    distortion: np.ndarray | None = None

    @property
    def bottom(self) -> float:
        """The lowest row that the crop reads, directly or reflected above the top border."""
        if self.distortion is not None:
            corners = self.distortion @ [[-0.5, -0.5, 0.5, 0.5], [-0.5, 0.5, -0.5, 0.5], [1, 1, 1, 1]]
            across, down = math.sin(self.angle) * self.mirror * self.width, math.cos(self.angle) * self.height
            places = self.top + self.height / 2 + across * corners[0] + down * corners[1]
            return max(places.max(), -places.min())
        half = self.height * abs(math.cos(self.angle)) + self.width * abs(math.sin(self.angle))
        return self.top + (self.height + half) / 2


def draw_crop(
    height: int,
    width: int,
    flip: bool,
    rotation_degrees: float,
    key: tuple[int, ...],
    distortion: np.ndarray | None = None,
) -> Crop:
    """Draws a crop for an image of the given size.

    Args:
        height, width: size of the whole image.
        flip: whether to mirror half of the images.
        rotation_degrees: rotate by an angle uniform in +- this many degrees.
        key: integers from which all random choices derive.
        distortion: see `Crop`.
    """
    draws = random.Random(str(key))  # NumPy's generator takes twice as long, and other threads wait meanwhile
    box = random_crop_box(draws, height, width)
    angle = math.radians(draws.uniform(-rotation_degrees, rotation_degrees))
    return Crop(*box, angle, -1.0 if flip and draws.random() < 0.5 else 1.0, distortion)


def alternating_mirror(seed: int, epoch: int, index: int) -> bool:
    """Returns whether to mirror an image in this epoch: in every second one, for `data.alternating_flip`."""
    return (random.Random(str((seed, "flip", index))).random() < 0.5) ^ (epoch % 2 == 1)


def decode_for_crop(
    image: bytes | np.ndarray, channels: int, size: int, draw: Callable[[int, int], Crop]
) -> tuple[np.ndarray, Crop, int]:
    """Decodes what a random crop needs: a JPEG only down to the crop's last row, and reduced if still large enough.

    Args:
        image: the encoded image, or an array.
        channels: 1 or 3.
        size: height and width to which the crop will be resized.
        draw: maps (height, width) of the whole image to its crop.

    Returns:
        The pixels uint8 `[H, W, C]`, the crop, and the factor by which the pixels are smaller than the
        whole image.

    Raises:
        BadImage: see `decode`.
    """
    head = read_head(image) if isinstance(image, bytes) else None
    if head is None:
        pixels = decode(image, channels)
        return pixels, draw(*pixels.shape[:2]), 1
    if math.prod(head.size) > MAX_PIXELS:
        raise BadImage(too_large(head.size))
    crop = draw(*head.size)
    fits = lambda n: min(crop.height, crop.width) >= n * size and head.size[0] >= max(REDUCTION_FLAGS)
    reduction = max(n for n in REDUCTION_FLAGS if n == 1 or fits(n))
    if channels == 3 and head.from_top and head.orientation == UPRIGHT:
        check_whole(image)
        try:
            return decode_top(image, head, math.ceil(crop.bottom) + 1, reduction), crop, reduction
        except ValueError:
            pass  # let OpenCV decide whether it is bad
    pixels = decode(image, channels, reduction)
    if pixels.shape[:2] != tuple(math.ceil(side / reduction) for side in head.size):  # OpenCV reads the EXIF otherwise
        pixels = decode(image, channels)
        return pixels, draw(*pixels.shape[:2]), 1
    return pixels, crop, reduction


def warp(image: np.ndarray, size: int, crop: Crop, reduction: int = 1, out: np.ndarray | None = None) -> np.ndarray:
    """Crops, mirrors and rotates in one warp: uint8 `[H, W, C]` -> `[size, size, C]`.

    Args:
        image: the decoded image.
        size: height and width of the result.
        crop: the crop, in pixels of the whole image.
        reduction: factor by which `image` is smaller than the whole image.
        out: array to write a three-channel result to, if given.
    """
    down_y = down_x = 1 / reduction
    shrink = int(min(crop.height, crop.width) / reduction / size)
    if shrink >= 2:  # average first, because the warp reads only 2x2 pixels
        height, width = image.shape[:2]
        small = (max(1, width // shrink), max(1, height // shrink))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA).reshape(*small[::-1], image.shape[2])
        down_y, down_x = down_y * small[1] / height, down_x * small[0] / width
    crop_height, crop_width = crop.height * down_y, crop.width * down_x
    # From output pixel to input pixel: centre, mirror, scale to the crop, rotate, move to its centre. In plain floats,
    # because NumPy's overhead on so few numbers would be a tenth of the warp's time, and NumPy holds the GIL.
    scale_x, scale_y = crop.mirror * crop_width / size, crop_height / size
    cos, sin, middle = math.cos(crop.angle), math.sin(crop.angle), (size - 1) / 2
    a, b, c, d = cos * scale_x, -sin * scale_y, sin * scale_x, cos * scale_y
    x = crop.left * down_x + crop_width / 2 - 0.5 - (a + b) * middle
    y = crop.top * down_y + crop_height / 2 - 0.5 - (c + d) * middle
    if image.shape[2] == 3 and crop.distortion is None:  # a distortion may reflect any part of the image
        # Keep only the part that the warp reads, because the image is copied below.
        across, down = sorted((0, a * size, b * size, (a + b) * size)), sorted((0, c * size, d * size, (c + d) * size))
        left, top = max(int(x + across[0]) - 2, 0), max(int(y + down[0]) - 2, 0)
        image = image[top : int(y + down[3]) + 3, left : int(x + across[3]) + 3]
        x, y = x - left, y - top
    matrix = np.array([[a, b, x], [c, d, y]])
    if crop.distortion is not None:
        pixel = np.array([[size, 0, middle], [0, size, middle], [0, 0, 1]])  # from image sides about the centre
        matrix = matrix @ pixel @ crop.distortion @ np.linalg.inv(pixel)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    if image.shape[2] == 1:
        warped = cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        return warped[:, :, None]
    # OpenCV warps four channels more than twice as fast as three, which pays for both conversions.
    four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    warped = cv2.warpAffine(four, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB, dst=out)


def random_warp(image: np.ndarray, size: int, flip: bool, rotation_degrees: float, key: tuple[int, ...]) -> np.ndarray:
    """Crops, flips and rotates a decoded image at random: uint8 `[H, W, C]` -> `[size, size, C]`; see `draw_crop`."""
    return warp(image, size, draw_crop(*image.shape[:2], flip, rotation_degrees, key))


def host_transform(data: Any, channels: int, *, train: bool, seed: int, size: int = 0) -> Any:
    """Returns `transform(image, index, epoch, out=None) -> uint8 [size, size, channels]` for a `config.data`.

    With `data.augmentation` "imagenet" it crops; with "small" and "none" it resizes the whole image
    ("small" is augmented on the device, see `device_augmentation.py`, except for RandAugment). The
    result is written to `out` if that saves a copy; otherwise `out` is not changed.

    Args:
        data: `config.data`.
        channels: number of channels of the images, 1 or 3.
        train: whether to augment.
        seed: seed of all random choices, together with the epoch and the example's index.
        size: height and width of the result; 0: `data.image_size`.
    """
    # Read the keys only once, because a ConfigDict is slow.
    size, flip, rotation_degrees = size or data.image_size, data.flip, data.rotation_degrees
    alternating, augmentation, fraction = data.alternating_flip, data.augmentation, data.eval_crop_fraction
    ops, magnitude = data.randaugment_ops if train else 0, data.randaugment_magnitude

    def transform(image: bytes | np.ndarray, index: int, epoch: int, out: np.ndarray | None = None) -> np.ndarray:
        key = (seed, epoch, index)
        operations = draw_operations(ops, magnitude, key) if ops else NOTHING
        if augmentation != "imagenet":
            pixels = resize(decode(image, channels), size, size)
            if operations.matrix is not None:
                pixels = warp(pixels, size, Crop(0, 0, size, size, 0, 1, operations.matrix))
            return apply_colours(pixels, operations)
        if not train:
            return central_crop(decode(image, channels), size, fraction)
        random_flip = flip and not alternating
        draw = lambda height, width: draw_crop(height, width, random_flip, rotation_degrees, key, operations.matrix)
        if alternating:
            mirror = -1.0 if alternating_mirror(seed, epoch, index) else 1.0
            draw = lambda height, width, draw=draw: draw(height, width)._replace(mirror=mirror)
        pixels, crop, reduction = decode_for_crop(image, channels, size, draw)
        return apply_colours(warp(pixels, size, crop, reduction, out), operations)

    return transform
