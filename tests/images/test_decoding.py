"""Broken files: tests/images/test_bad_images.py; sizes that headers claim: tests/images/test_image_heads.py."""

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
