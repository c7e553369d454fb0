import cv2
import numpy as np
import pytest

from configs import base
from hga_flax.data import host_augmentation as host

RAMP = np.stack(np.broadcast_arrays(np.arange(60)[:, None] * 2, np.arange(90)[None] * 2, 7), axis=-1).astype(np.uint8)


def test_decode_gives_rgb_and_grey():
    png = cv2.imencode(".png", RAMP[..., ::-1])[1].tobytes()  # OpenCV writes BGR
    np.testing.assert_array_equal(host.decode(png, 3), RAMP)
    assert host.decode(png, 1).shape == (60, 90, 1)
    with pytest.raises(ValueError, match="cannot be decoded"):
        host.decode(b"no image", 3)


def test_central_crop_takes_the_centre_of_the_short_side():
    crop = host.central_crop(RAMP, 28, 0.875)  # short side to 32, so a scale of 32 / 60
    assert crop.shape == (28, 28, 3)
    middle = crop.mean(axis=(0, 1))
    np.testing.assert_allclose(middle, RAMP.mean(axis=(0, 1)), atol=1)
    assert crop[-1, 0, 0] - crop[0, 0, 0] == pytest.approx(2 * 27 * 60 / 32, abs=2)


@pytest.mark.parametrize("key", [(0, 0, i) for i in range(20)])
def test_the_warp_equals_cropping_with_plain_arithmetic(key):
    warped = host.random_warp(RAMP, 16, flip=True, rotation_degrees=0.0, key=key).astype(float)
    random = np.random.default_rng(key)
    top, left, height, width = host.random_crop_box(random, 60, 90)
    random.uniform(0, 0)
    mirror = random.random() < 0.5
    rows = top + (np.arange(16) + 0.5) * height / 16 - 0.5
    columns = left + (np.arange(16) + 0.5) * width / 16 - 0.5
    columns = columns[::-1] if mirror else columns
    inside = (rows > 0) & (rows < 59)
    np.testing.assert_allclose(warped[inside, 8, 0], 2 * rows[inside], atol=1.1)  # the ramp reads off positions
    inside = (columns > 0) & (columns < 89)
    np.testing.assert_allclose(warped[8, inside, 1], 2 * columns[inside], atol=1.1)


def test_the_warp_rotates_within_the_angle():
    line = np.zeros((101, 101, 1), np.uint8)
    line[:, 50] = 255
    angles = []
    for i in range(40):
        warped = host.random_warp(line, 64, flip=False, rotation_degrees=10.0, key=(1, 0, i))
        rows, columns = np.nonzero(warped[..., 0] > 100)
        if len(rows) > 30:
            angles.append(np.degrees(np.arctan(np.polyfit(rows, columns, 1)[0])))
    assert len(angles) > 10 and 3 < np.abs(angles).max() < 14  # the aspect ratio of the crop stretches angles


def test_crop_boxes_lie_inside_and_have_the_area_and_aspect_asked_for():
    random = np.random.default_rng(0)
    for _ in range(200):
        top, left, height, width = host.random_crop_box(random, 60, 90)
        assert 0 <= top <= 60 - height + 1e-9 and 0 <= left <= 90 - width + 1e-9
        assert 0.079 < height * width / 5400 <= 1 and 0.74 < width / height < 1.34


def test_an_extreme_shape_falls_back_to_the_centre():
    top, left, height, width = host.random_crop_box(np.random.default_rng(0), 1, 1000)
    assert (top, height) == (0, 1) and width == pytest.approx(4 / 3) and left == pytest.approx(500 - 2 / 3)


def test_the_randomness_is_a_function_of_seed_epoch_and_index():
    data = base.get_config().data
    with data.unlocked():
        data.image_size = 16
    transform = host.host_transform(data, 3, True, seed=5)
    np.testing.assert_array_equal(transform(RAMP, 3, 1), host.host_transform(data, 3, True, seed=5)(RAMP, 3, 1))
    for other in [(RAMP, 4, 1), (RAMP, 3, 2)]:
        assert (transform(RAMP, 3, 1) != transform(*other)).any()
    assert (transform(RAMP, 3, 1) != host.host_transform(data, 3, True, seed=6)(RAMP, 3, 1)).any()


def test_small_images_are_only_resized():
    data = base.get_config().data
    with data.unlocked():
        data.image_size, data.augmentation = 30, "small"
    out = host.host_transform(data, 3, True, seed=0)(RAMP[:, :60], 0, 0)
    np.testing.assert_array_equal(out, cv2.resize(RAMP[:, :60], (30, 30), interpolation=cv2.INTER_AREA))
