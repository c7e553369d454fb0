"""Images broken in all the ways that real ones are, and whole ones that are unusual."""

import pathlib
import struct
import zlib

import cv2
import numpy as np

PHOTO = cv2.resize(
    np.stack(np.broadcast_arrays(np.arange(80)[:, None] * 3, np.arange(120)[None] * 2, 90), axis=-1).astype(np.uint8),
    (60, 40),
)


def encode(suffix, image=PHOTO, *options):
    return cv2.imencode(suffix, image[..., ::-1] if image.ndim == 3 else image, list(options))[1].tobytes()


JPEG, PNG, WEBP = encode(".jpg"), encode(".png"), encode(".webp")


def exif(orientation):
    """The JPEG with an EXIF orientation."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    block = b"Exif\0\0" + tiff
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + JPEG[2:]


def corrupt_png():
    """Its compressed data is damaged, and the checksum of the chunk tells nothing."""
    start = PNG.index(b"IDAT") + 4
    (length,) = struct.unpack_from(">I", PNG, start - 8)
    data = PNG[start : start + 8] + b"\x55" * 8 + PNG[start + 16 : start + length]
    return PNG[:start] + data + struct.pack(">I", zlib.crc32(b"IDAT" + data)) + PNG[start + length + 4 :]


def animation():
    """Two frames as a GIF."""
    frames = cv2.Animation()
    frames.frames, frames.durations = [PHOTO[..., ::-1].copy(), 255 - PHOTO], np.array([100, 100], np.int32)
    return cv2.imencodeanimation(".gif", frames)[1].tobytes()


# As Photoshop writes them: inverted, with Adobe's marker. Made by Pillow, from PHOTO.
CMYK = (pathlib.Path(__file__).parent / "files" / "cmyk.jpg").read_bytes()

BROKEN = {
    "empty.jpg": b"",
    "truncated.jpg": JPEG[: len(JPEG) * 3 // 4],
    "headonly.jpg": JPEG[:40],
    "truncated.png": PNG[: len(PNG) // 2],
    "truncated.webp": WEBP[: len(WEBP) // 2],
    "corrupt.jpg": JPEG[:2] + b"\x55" * 60 + JPEG[62:],
    "corrupt.png": corrupt_png(),
    "text.jpg": b"<html>404 Not Found</html>",
}
UNUSUAL = {
    "cmyk.jpg": CMYK,
    "grey.jpg": encode(".jpg", PHOTO[..., 0]),
    "sixteen.png": encode(".png", PHOTO[..., 0].astype(np.uint16) * 257),
    "alpha.png": encode(".png", np.dstack([PHOTO, np.full(PHOTO.shape[:2], 128, np.uint8)])[..., [3, 0, 1, 2]]),
    "animated.gif": animation(),
    "rotated.jpg": exif(6),
    "png.jpg": PNG,
    "jpeg.png": JPEG,
    "webp.png": WEBP,
}
