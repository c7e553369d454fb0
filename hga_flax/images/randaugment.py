"""RandAugment: a few random operations per training image, all at about the same magnitude.

Cubuk et al., RandAugment, 2020, https://arxiv.org/abs/1909.13719. The operations and their strengths
are those of timm's "inc1" (rand-mM-nN-mstd0.5-inc1), which ResNet strikes back uses
(https://arxiv.org/abs/2110.00476): N of 15 operations are drawn with replacement, and each is applied
with probability 1/2 and a magnitude normally distributed about M.

Unlike in timm, the geometric operations are part of the warp that crops and resizes, so they precede
the others, whatever order was drawn. The image is interpolated only once, and areas outside the crop
show the image itself, reflected at its border, instead of grey. Posterize keeps at least one bit.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

PROBABILITY, DEVIATION, STRONGEST = 0.5, 0.5, 10.0
STREAM = 1  # separates these random numbers from the crop's, which use the key alone
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's kernel
LEVELS = np.arange(256)


class Operations(NamedTuple):
    """The operations drawn for an image.

    Attributes:
        matrix: `[3, 3]`, maps a position in the result to its position in the image, as (x, y, 1) from the
            centre in units of the image's sides; None for the identity.
        colours: (name, value) of the other operations, in order.
    """

    matrix: np.ndarray | None
    colours: tuple[tuple[str, float], ...]


def rotate(degrees: float) -> list[list[float]]:
    """Returns the matrix of a rotation about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[cos, -sin, 0], [sin, cos, 0]]


# Like Pillow's transforms, which shear about the upper left corner.
GEOMETRIC: dict[str, Callable[[float], list[list[float]]]] = {
    "rotate": rotate,
    "shear_x": lambda value: [[1, value, value / 2], [0, 1, 0]],
    "shear_y": lambda value: [[1, 0, 0], [value, 1, value / 2]],
    "translate_x": lambda value: [[1, 0, value], [0, 1, 0]],
    "translate_y": lambda value: [[1, 0, 0], [0, 1, value]],
}


def look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps grey levels by a table, `[256]` for all channels or `[256, C]`, clipped to 0..255 and truncated."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    if table.ndim > 1:
        table = table[:, 0] if image.shape[2] == 1 else table[None]
    return cv2.LUT(image, table).reshape(image.shape)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to 0..255."""
    low = image.min(axis=(0, 1)).astype(float)
    scale = 255 / np.maximum(image.max(axis=(0, 1)) - low, 1e-9)
    return look_up(image, np.where(scale <= 255, (LEVELS[:, None] - low) * scale + 1e-6, LEVELS[:, None]))


def equalize(image: np.ndarray) -> np.ndarray:
    """Flattens each channel's histogram, as Pillow does."""
    tables = []
    for channel in range(image.shape[2]):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[np.nonzero(counts)[0][-1]]) // 255
        tables.append((step // 2 + np.cumsum(counts) - counts) // step if step else LEVELS)
    return look_up(image, np.stack(tables, axis=-1))


def grey(image: np.ndarray) -> np.ndarray:
    """Returns the luma: uint8 `[H, W]`."""
    return image[..., 0] if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def blend(image: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """Returns factor * image + (1 - factor) * other."""
    return cv2.addWeighted(image, factor, other, 1 - factor, 0).reshape(image.shape)


def colour(image: np.ndarray, factor: float) -> np.ndarray:
    """Changes the saturation: 0 gives grey, 1 the image, more stronger colours."""
    return image if image.shape[2] == 1 else blend(image, cv2.cvtColor(grey(image), cv2.COLOR_GRAY2RGB), factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Changes the contrast: 0 gives the mean grey, 1 the image, more a higher contrast."""
    mean = int(grey(image).mean() + 0.5)
    return look_up(image, mean + factor * (LEVELS - mean))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Changes the sharpness: 0 gives a smoothed image, 1 the image, more a sharper one; the border pixels stay."""
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, SMOOTH).reshape(image.shape)[1:-1, 1:-1]
    return blend(image, smooth, factor)


COLOURS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "autocontrast": lambda image, _: autocontrast(image),
    "equalize": lambda image, _: equalize(image),
    "invert": lambda image, _: look_up(image, 255 - LEVELS),
    "posterize": lambda image, bits: look_up(image, LEVELS & ~(2 ** (8 - int(bits)) - 1)),
    "solarize": lambda image, limit: look_up(image, np.where(limit > LEVELS, LEVELS, 255 - LEVELS)),
    "solarize_add": lambda image, add: look_up(image, np.where(LEVELS < 128, LEVELS + int(add), LEVELS)),
    "colour": colour,
    "contrast": contrast,
    "brightness": lambda image, factor: look_up(image, factor * LEVELS),
    "sharpness": sharpness,
}


def _enhance(share: float, sign: float) -> float:
    return max(0.1, 1 + sign * 0.9 * share)


# For each operation, a function (magnitude as a share of the largest, sign) -> value.
VALUES: dict[str, Callable[[float, float], float]] = {
    "autocontrast": lambda share, sign: 0,
    "equalize": lambda share, sign: 0,
    "invert": lambda share, sign: 0,
    "rotate": lambda share, sign: sign * 30 * share,
    "posterize": lambda share, sign: max(1, 4 - int(4 * share)),
    "solarize": lambda share, sign: 256 - int(256 * share),
    "solarize_add": lambda share, sign: int(110 * share),
    "colour": _enhance,
    "contrast": _enhance,
    "brightness": _enhance,
    "sharpness": _enhance,
    "shear_x": lambda share, sign: sign * 0.3 * share,
    "shear_y": lambda share, sign: sign * 0.3 * share,
    "translate_x": lambda share, sign: sign * 0.45 * share,
    "translate_y": lambda share, sign: sign * 0.45 * share,
}
NAMES = tuple(VALUES)


def draw_operations(count: int, magnitude: float, key: tuple[int, ...]) -> Operations:
    """Draws the operations for an image.

    Args:
        count: number of operations drawn; on average half of them are applied.
        magnitude: mean magnitude, 0 to 10.
        key: integers from which all random choices derive.
    """
    random = np.random.default_rng((*key, STREAM))
    matrix, colours = None, []
    for _ in range(count):
        name, applied = NAMES[random.integers(len(NAMES))], random.random() < PROBABILITY
        share = min(max(random.normal(magnitude, DEVIATION), 0.0), STRONGEST) / STRONGEST
        value = VALUES[name](share, 1.0 if random.random() < 0.5 else -1.0)
        if applied and name in GEOMETRIC:
            step = np.array([*GEOMETRIC[name](value), [0, 0, 1]], float)
            matrix = step if matrix is None else matrix @ step
        elif applied:
            colours.append((name, value))
    return Operations(matrix, tuple(colours))


def apply_colours(image: np.ndarray, operations: Operations) -> np.ndarray:
    """Applies the operations that move no pixels to uint8 `[H, W, C]`; returns the same shape."""
    for name, value in operations.colours:
        image = COLOURS[name](image, value)
    return image
