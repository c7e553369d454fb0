import struct

import pytest

from hga_flax.data.jpeg import jpeg_size
from tests.data.broken import JPEG, PHOTO, PNG, exif


def test_the_size_is_that_of_the_upright_image():
    assert jpeg_size(JPEG) == PHOTO.shape[:2]
    for orientation in range(1, 9):
        shape = PHOTO.shape[:2] if orientation < 5 else PHOTO.shape[1::-1]
        assert jpeg_size(exif(orientation)) == shape


def test_big_endian_exif():
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 8, 0, 0)
    block = b"Exif\0\0" + tiff
    data = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + JPEG[2:]
    assert jpeg_size(data) == PHOTO.shape[1::-1]


@pytest.mark.parametrize("data", [b"", PNG, JPEG[:3], JPEG[:30], b"\xff\xd8\xff\xe1\0\x08Exif", exif(6)[:50]])
def test_what_is_no_jpeg_or_cut_off_has_no_size(data):
    assert jpeg_size(data) is None
