"""Decodes images with OpenCV. An image that is truncated, damaged or too large raises BadImage."""

import math

import cv2
import numpy as np

from hga_flax.errors import one_line
from hga_flax.images import MAX_PIXELS
from hga_flax.images.bad_images import BadImage
from hga_flax.images.image_heads import claimed_size, netpbm_white

cv2.setNumThreads(0)  # the loader's threads are enough; OpenCV's own would compete for the cores
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # bad_images.py reports bad images, once

DECODE_FLAGS = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}
REDUCTION_FLAGS = {1: 0, 2: 16, 4: 32, 8: 64}  # IMREAD_REDUCED_*


def decode(image: bytes | np.ndarray, channels: int, reduction: int = 1) -> np.ndarray:
    """Decodes an image to uint8 `[H, W, channels]`, upright according to its EXIF; arrays pass through.

    The format is detected from the content, not from the file name. 16 bits become 8, CMYK becomes RGB,
    transparency is dropped, and only the first frame of an animation is decoded.

    Args:
        image: the encoded image, or an array.
        channels: 1 or 3.
        reduction: 1, 2, 4 or 8: factor by which the decoded height and width are smaller (much faster for JPEGs).

    Raises:
        BadImage: OpenCV cannot read the bytes, the image is incomplete, or it claims too many pixels.
    """
    if isinstance(image, np.ndarray):
        return image
    if not image:
        raise BadImage("the file is empty or cannot be read")
    size = claimed_size(image)
    if size and math.prod(size) > MAX_PIXELS:
        raise BadImage(too_large(size))
    if image[:2] in (b"Pf", b"PF"):  # OpenCV truncates its values, of which 1 is white
        raise BadImage("images of floats (PFM) are not read; convert it to PNG or JPEG")
    if (white := netpbm_white(image)) not in (None, 255, 65535):  # OpenCV does not scale other ranges
        raise BadImage(f"its white is {white}; PGM, PPM and PAM are read only with 255 or 65535: convert it to PNG")
    check_whole(image)
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), DECODE_FLAGS[channels] | REDUCTION_FLAGS[reduction])
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in error.err:
            raise BadImage(too_large()) from None
        raise BadImage(f"the image of {len(image)} bytes cannot be decoded ({one_line(error.err)})") from None
    if pixels is None:
        raise BadImage(f"the image of {len(image)} bytes cannot be decoded")
    return pixels[:, :, None] if channels == 1 else pixels


def too_large(size: tuple[int, int] | None = None) -> str:
    """Returns the message for an image of `size` (height, width), or of unknown size, above the limit of pixels."""
    claims = f"{size[1]:,} x {size[0]:,} pixels, above" if size else "more pixels than"
    return f"it claims {claims} the limit of {MAX_PIXELS:,}: make it smaller"


def check_whole(image: bytes) -> None:
    """Raises BadImage for a truncated JPEG, because decoders fill the missing part with grey."""
    # A complete JPEG ends with a marker that cannot occur in its data.
    if image[:2] == b"\xff\xd8" and image[-2:] != b"\xff\xd9" and image.rfind(b"\xff\xd9") < image.rfind(b"\xff\xda"):
        raise BadImage(f"the JPEG of {len(image)} bytes is cut off")
