"""Decodes images with OpenCV. An image that is truncated, damaged or too large raises BadImage."""

import math
import re

import cv2
import numpy as np

from hga_flax.errors import one_line
from hga_flax.images import MAX_PIXELS
from hga_flax.images.bad_images import BadImage
from hga_flax.images.image_heads import avif_turns, claimed_size, netpbm_white, pam_has_alpha, tiff_has_alpha

cv2.setNumThreads(0)  # the loader's threads are enough; OpenCV's own would compete for the cores
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # bad_images.py reports bad images, once

# What begins a segment of a JPEG: in compressed data, 0 and the restart markers D0 to D7 follow an FF.
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
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
    if channels not in DECODE_FLAGS:
        raise BadImage(f"the network takes {channels} channels, and image files are read with 1 or 3; give arrays")
    if not image:
        raise BadImage("the file is empty or cannot be read")
    size = claimed_size(image)
    if size and math.prod(size) > MAX_PIXELS:
        raise BadImage(too_large(size))
    if image[:2] in (b"Pf", b"PF"):  # OpenCV truncates its values, of which 1 is white
        raise BadImage("images of floats (PFM) are not read; convert it to PNG or JPEG")
    if (white := netpbm_white(image)) not in (None, 255, 65535):  # OpenCV does not scale other ranges
        raise BadImage(f"its white is {white}; PGM, PPM and PAM are read only with 255 or 65535: convert it to PNG")
    turns = avif_turns(image)
    if turns is None or len(turns) > 1:
        raise BadImage("a mirrored AVIF is not read; convert it to PNG or JPEG")
    if pam_has_alpha(image):  # OpenCV would return memory that it has not filled
        raise BadImage("a PAM with transparency is not read; convert it to PNG")
    check_whole(image)
    if tiff_has_alpha(image) and _shows_through(image):  # OpenCV would make it darker
        raise BadImage("a TIFF with transparency is not read; convert it to PNG")
    # OpenCV gives blue first for an AVIF with transparency, whatever is asked for.
    avif = channels == 3 and image[4:8] == b"ftyp"
    flag = cv2.IMREAD_COLOR if avif else DECODE_FLAGS[channels]
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flag | REDUCTION_FLAGS[reduction])
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in error.err:
            raise BadImage(too_large()) from None
        raise BadImage(f"the image of {len(image)} bytes cannot be decoded ({one_line(error.err)})") from None
    if pixels is None:
        raise BadImage(f"the image of {len(image)} bytes cannot be decoded")
    pixels = pixels[..., ::-1] if avif else pixels
    pixels = np.ascontiguousarray(np.rot90(pixels, turns.pop()))  # OpenCV does not turn AVIFs
    return pixels[:, :, None] if channels == 1 else pixels


def _shows_through(image: bytes) -> bool:
    try:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return False
    alpha = None if pixels is None or pixels.ndim < 3 or pixels.shape[2] not in (2, 4) else pixels[..., -1]
    return alpha is not None and alpha.dtype.kind == "u" and alpha.min() < np.iinfo(alpha.dtype).max


def too_large(size: tuple[int, int] | None = None) -> str:
    """Returns the message for an image of `size` (height, width), or of unknown size, above the limit of pixels."""
    claims = f"{size[1]:,} x {size[0]:,} pixels, above" if size else "more pixels than"
    return f"it claims {claims} the limit of {MAX_PIXELS:,}: make it smaller"


def check_whole(image: bytes) -> None:
    """Raises BadImage for a truncated JPEG, because decoders fill the missing part with grey."""
    # A complete JPEG ends with a marker that cannot occur in its data. Something may follow: phones append a film.
    if image[:2] == b"\xff\xd8" and image[-2:] != b"\xff\xd9" and not _ends(image):
        raise BadImage(f"the JPEG of {len(image)} bytes is cut off")


def _ends(jpeg: bytes) -> bool:
    """Returns whether a JPEG has its end marker, which segments and compressed data are searched for in order."""
    at = 2
    while marker := MARKER.search(jpeg, at):
        if marker[1] == b"\xd9":
            return True
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return False
