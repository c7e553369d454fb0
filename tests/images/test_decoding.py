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
    with pytest.raises(BadImage, match="the network takes 4 channels, and image files are read with 1 or 3; give arr"):
        decode(png, 4)


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


@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("alpha", [128, 255])
def test_an_avif_with_transparency_keeps_its_colours(alpha, depth):
    """OpenCV ignores the request for RGB if the file has transparency."""
    clear = np.full((48, 64, 4), (20, 100, 220, alpha), np.uint16)  # BGR
    clear = clear.astype(np.uint8) if depth == 8 else clear << 2 | clear >> 6
    try:
        avif = cv2.imencode(".avif", clear, [cv2.IMWRITE_AVIF_DEPTH, depth])[1].tobytes()
    except cv2.error:
        pytest.skip("this OpenCV writes no AVIF")
    assert np.abs(decode(avif, 3)[20, 20] - [220.0, 100, 20]).max() < 3
    assert abs(decode(avif, 1)[20, 20, 0] - 126.0) < 3


@pytest.mark.parametrize("white", [255, 65535])
@pytest.mark.parametrize(("kind", "pixel"), [("RGB", (220, 100, 20)), ("GRAYSCALE", (200,))])
def test_a_pam_with_transparency_is_not_read(kind, pixel, white):
    """OpenCV fills only a part of the image."""
    head = "P7\n# an _ALPHA\nWIDTH 6\nHEIGHT 4\nDEPTH {}\nMAXVAL {}\nTUPLTYPE {}\nENDHDR\n"

    def pam(kind, pixel):
        values = np.tile(pixel, (4, 6, 1)) * (white // 255)
        return head.format(len(pixel), white, kind).encode() + values.astype("u1" if white == 255 else ">u2").tobytes()

    for channels, grey in ((3, pixel), (1, 127 if len(pixel) == 3 else 200)):
        assert (decode(pam(kind, pixel), channels) == grey).all()
        with pytest.raises(BadImage, match="a PAM with transparency is not read; convert it to PNG"):
            decode(pam(f"{kind}_ALPHA", (*pixel, 128)), channels)


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
