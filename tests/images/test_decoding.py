"""Broken files: tests/images/test_bad_images.py; sizes that headers claim: tests/images/test_image_heads.py."""

import base64

import cv2
import numpy as np
import pytest

from hga_flax.images.bad_images import BadImage
from hga_flax.images.decoding import check_whole, decode
from tests.images.test_host_augmentation import RAMP


def test_decode_gives_rgb_and_grey():
    png = cv2.imencode(".png", RAMP[..., ::-1])[1].tobytes()  # OpenCV writes BGR
    np.testing.assert_array_equal(decode(png, 3), RAMP)
    assert decode(png, 1).shape == (60, 90, 1)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(b"no image", 3)


def test_a_jpeg_that_is_cut_anywhere_in_its_data_is_noticed():
    jpeg = cv2.imencode(".jpg", RAMP)[1].tobytes()
    check_whole(jpeg)
    check_whole(jpeg + b"\0trailing")  # as some cameras write
    for end in range(jpeg.rfind(b"\xff\xda") + 2, len(jpeg) - 1, 7):
        with pytest.raises(BadImage, match=f"the JPEG of {end} bytes is cut off"):
            decode(jpeg[:end], 3)


@pytest.mark.parametrize("progressive", [0, 1])
def test_what_follows_a_jpeg_does_not_count(progressive):
    """Phones append a film, which holds every pair of bytes somewhere."""
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive, cv2.IMWRITE_JPEG_RST_INTERVAL, 4]
    jpeg, random = cv2.imencode(".jpg", RAMP, flags)[1].tobytes(), np.random.default_rng(0)
    for _ in range(20):
        film = random.bytes(60_000) + b"\xff\xda"
        check_whole(jpeg + film)
        with pytest.raises(BadImage, match="is cut off"):
            check_whole(jpeg[:-2])
    np.testing.assert_array_equal(decode(jpeg + film, 3), decode(jpeg, 3))


# Written by Pillow 13 from 16 x 8 pixels with EXIF's orientation 6: left red, right blue, the upper three rows green.
TURNED = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAAD1bWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAAAAAAAOcGl0"
    "bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAEdAAAAUAAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAAB0aXBy"
    "cAAAAFRpcGNvAAAAFGlzcGUAAAAAAAAAEAAAAAgAAAAQcGl4aQAAAAADCAgIAAAADGF2MUOBIAAAAAAAE2NvbHJuY2x4AAEADQAGgAAAAAlpcm90"
    "AwAAABhpcG1hAAAAAAAAAAEAAQUBAoMEhQAAAFhtZGF0EgAKCDgMv7SAhoNIMkISAkNKgEEEHyAAAP/RPRfAZz3Y4YUYE16RkgbN1+IpULWb3TjP"
    "nYMW+PlKDMz6fr7ZDQaa+wBfLctwXyiSTcrRQ+w="
)


def test_an_avif_is_turned_upright():
    try:
        pixels = decode(TURNED, 3)
    except BadImage:
        pytest.skip("this OpenCV reads no AVIF")
    assert pixels.shape == (16, 8, 3)
    assert [pixels[at].argmax() for at in ((2, 1), (13, 1), (2, 6), (13, 6))] == [0, 2, 1, 1]
    assert decode(TURNED, 1).shape == (16, 8, 1)
    with pytest.raises(BadImage, match="a mirrored AVIF is not read"):
        decode(TURNED.replace(b"irot\x03", b"imir\x00"), 3)


# Written by Pillow 13 from 2 x 2 pixels of grey 200 with an alpha of 128.
CLEAR = base64.b64decode(
    "SUkqAAgAAAALAAABBAABAAAAAgAAAAEBBAABAAAAAgAAAAIBAwAEAAAAkgAAAAMBAwABAAAAAQAAAAYBAwABAAAAAgAAABEBBAABAAAAmgAAABUBAwAB"
    "AAAABAAAABYBBAABAAAAAgAAABcBBAABAAAAEAAAABwBAwABAAAAAQAAAFIBAwABAAAAAgAAAAAAAAAIAAgACAAIAMjIyIDIyMiAyMjIgMjIyIA="
)


def test_a_tiff_with_transparency_is_not_read_too_dark():
    with pytest.raises(BadImage, match="a TIFF with transparency is not read; convert it to PNG"):
        decode(CLEAR, 3)
    assert (decode(CLEAR.replace(b"\xc8\xc8\xc8\x80", b"\xc8\xc8\xc8\xff"), 3) == 200).all()
    clear = np.array([[[200, 200, 200, 128]]], np.uint8)
    for suffix in (".png", ".tiff"):  # OpenCV's TIFFs do not say what their fourth channel is
        assert (decode(cv2.imencode(suffix, clear)[1].tobytes(), 3) == 200).all()
