import contextlib
import struct

import cv2
import numpy as np
import pytest

from hga_flax.images.jpeg import decode_top, read_head
from tests.data.broken import JPEG, PHOTO, PNG, exif


def test_the_size_is_that_of_the_upright_image():
    assert read_head(JPEG).size == PHOTO.shape[:2]
    for orientation in range(1, 9):
        shape = PHOTO.shape[:2] if orientation < 5 else PHOTO.shape[1::-1]
        assert read_head(exif(orientation)).size == shape
        assert read_head(exif(orientation)).orientation == orientation


def test_big_endian_exif():
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 8, 0, 0)
    block = b"Exif\0\0" + tiff
    data = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + JPEG[2:]
    assert read_head(data).size == PHOTO.shape[1::-1]


@pytest.mark.parametrize("data", [b"", PNG, JPEG[:3], JPEG[:30], b"\xff\xd8\xff\xe1\0\x08Exif", exif(6)[:50]])
def test_what_is_no_jpeg_or_cut_off_has_no_size(data):
    assert read_head(data) is None


def test_the_top_is_decoded_to_the_pixels_of_opencv():
    photo = np.random.default_rng(0).integers(0, 256, (200, 120, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", cv2.GaussianBlur(photo, (0, 0), 2))[1].tobytes()
    head = read_head(jpeg)
    assert head.from_top and head.orientation == 1
    whole = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    for rows, height in ((1, 16), (31, 32), (32, 48), (150, 160), (195, 200), (999, 200)):
        top = decode_top(jpeg, head, rows, 1)
        assert top.shape == (height, 120, 3)
        np.testing.assert_array_equal(top[:rows], whole[:rows])
    flags = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    for reduction, flag in flags.items():
        small = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flag)[..., ::-1]
        top = decode_top(jpeg, head, 100, reduction)
        assert top.shape == (112 // reduction, -(-120 // reduction), 3)
        np.testing.assert_array_equal(top[: 100 // reduction], small[: 100 // reduction])


@pytest.mark.parametrize("factor", ["411", "420", "422", "440", "444"])
def test_no_row_depends_on_what_is_left_out(factor):
    photo = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    sampling = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{factor}")
    jpeg = cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])[1].tobytes()
    head = read_head(jpeg)
    for reduction, flag in ((1, 0), (2, 16), (4, 32), (8, 64)):
        whole = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB | flag)
        for rows in range(1, 91):
            top = decode_top(jpeg, head, rows, reduction)[: rows // reduction]
            np.testing.assert_array_equal(top, whole[: rows // reduction], err_msg=f"{rows} rows / {reduction}")


def test_a_jpeg_in_several_scans_is_not_cut():
    jpeg = cv2.imencode(".jpg", PHOTO, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert read_head(jpeg).size == PHOTO.shape[:2] and not read_head(jpeg).from_top


def test_damage_is_an_error_or_pixels_never_a_crash():
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(JPEG)
        data[int(random.integers(2, len(data)))] = int(random.integers(256))
        head = read_head(bytes(data))
        if head is not None and head.from_top and max(head.size) < 1000:
            with contextlib.suppress(ValueError):
                decode_top(bytes(data), head, 20, 1)
