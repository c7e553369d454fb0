import functools
import random
import struct

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from configs import base
from hga_flax.images import host_augmentation as host
from hga_flax.images.decoding import decode
from tests.data.broken import JPEG, exif

RAMP = np.stack(np.broadcast_arrays(np.arange(60)[:, None] * 2, np.arange(90)[None] * 2, 7), axis=-1).astype(np.uint8)


def test_central_crop_takes_the_centre_of_the_short_side():
    crop = host.central_crop(RAMP, 28, 0.875)  # short side to 32, so a scale of 32 / 60
    assert crop.shape == (28, 28, 3)
    middle = crop.mean(axis=(0, 1))
    np.testing.assert_allclose(middle, RAMP.mean(axis=(0, 1)), atol=1)
    assert crop[-1, 0, 0] - crop[0, 0, 0] == pytest.approx(2 * 27 * 60 / 32, abs=2)


@pytest.mark.parametrize("key", [(0, 0, i) for i in range(20)])
def test_the_warp_equals_cropping_with_plain_arithmetic(key):
    warped = host.random_warp(RAMP, 16, flip=True, rotation_degrees=0.0, key=key).astype(float)
    draws = random.Random(str(key))
    top, left, height, width = host.random_crop_box(draws, 60, 90)
    draws.uniform(0, 0)
    mirror = draws.random() < 0.5
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
    draws = random.Random(0)
    for _ in range(200):
        top, left, height, width = host.random_crop_box(draws, 60, 90)
        assert 0 <= top <= 60 - height + 1e-9 and 0 <= left <= 90 - width + 1e-9
        assert 0.079 < height * width / 5400 <= 1 and 0.74 < width / height < 1.34


def test_an_extreme_shape_falls_back_to_the_centre():
    top, left, height, width = host.random_crop_box(random.Random(0), 1, 1000)
    assert (top, height) == (0, 1) and width == pytest.approx(4 / 3) and left == pytest.approx(500 - 2 / 3)


def test_the_randomness_is_a_function_of_seed_epoch_and_index():
    data = base.get_config().data
    with data.unlocked():
        data.image_size = 16
    transform = host.host_transform(data, 3, train=True, seed=5)
    np.testing.assert_array_equal(transform(RAMP, 3, 1), host.host_transform(data, 3, train=True, seed=5)(RAMP, 3, 1))
    for other in [(RAMP, 4, 1), (RAMP, 3, 2)]:
        assert (transform(RAMP, 3, 1) != transform(*other)).any()
    assert (transform(RAMP, 3, 1) != host.host_transform(data, 3, train=True, seed=6)(RAMP, 3, 1)).any()


def test_small_images_are_only_resized():
    data = base.get_config().data
    with data.unlocked():
        data.image_size, data.augmentation = 30, "small"
    out = host.host_transform(data, 3, train=True, seed=0)(RAMP[:, :60], 0, 0)
    np.testing.assert_array_equal(out, cv2.resize(RAMP[:, :60], (30, 30), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("shape", [(30, 320), (32, 320), (33, 320), (320, 30)])
def test_a_side_that_shrinks_is_averaged_whatever_the_other_does(shape):
    stripes = np.zeros((*shape, 1), np.uint8)
    stripes[(slice(None), slice(0, None, 10))[:: 1 if shape[1] == 320 else -1]] = 255
    assert np.ptp(host.resize(stripes, 32, 32)) == 0 and host.resize(stripes, 32, 32)[0, 0] in (25, 26)


def photographs():
    """scikit-learn's two, 640x427, as they are and at other sizes."""
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)
        for width, height in ((640, 427), (500, 375), (400, 267), (1280, 854), (200, 300)):
            interpolation = cv2.INTER_AREA if width < 640 else cv2.INTER_CUBIC
            yield cv2.resize(photo, (width, height), interpolation=interpolation)


def difference_from_pillow(photo, ours):
    """Mean difference of `ours(photo, height, width)`, a crop of 224 of an image of short side 256, from Pillow's."""
    image_module = pytest.importorskip("PIL.Image", reason="Pillow, the reference, is not installed")
    scale = 256 / min(photo.shape[:2])
    height, width = (round(side * scale) for side in photo.shape[:2])
    resized = np.asarray(image_module.fromarray(photo).resize((width, height), image_module.Resampling.BILINEAR))
    top, left = (height - 224) // 2, (width - 224) // 2
    part = slice(top, top + 224), slice(left, left + 224)
    return np.abs(ours(photo, height, width, part).astype(int) - resized[part]).mean()


def evaluated(photo, height, width, part):
    return host.central_crop(photo, 224, 0.875)


def test_evaluation_resizes_as_pillow_does():
    for photo in photographs():
        difference = difference_from_pillow(photo, evaluated)
        assert difference <= 1.5, (photo.shape, difference)


@pytest.mark.parametrize("short", [257, 260, 280, 320, 375, 427, 500, 1000])
def test_the_filter_suits_the_scale(short):
    """At each scale it is closer to Pillow's than averaging areas, alone or with taps for any scale, or as close."""
    taps = np.array([1 / 24, 22 / 24, 1 / 24])
    alone = lambda photo, height, width, part: host.resize(photo, height, width)[part]
    fixed = lambda photo, height, width, part: cv2.sepFilter2D(host.resize(photo, height, width), -1, taps, taps)[part]
    photos = [cv2.resize(load_sample_image(f"{name}.jpg"), (short * 3 // 2, short)) for name in ("china", "flower")]
    ours, *others = (sum(difference_from_pillow(p, way) for p in photos) for way in (evaluated, alone, fixed))
    assert ours <= 1.001 * min(others)


def test_an_alternating_flip_mirrors_each_crop_in_every_second_epoch():
    config = base.get_config().data
    config.image_size, config.rotation_degrees, config.alternating_flip = 16, 0.0, True
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[:, None], (40, 60, 1))  # brighter to the right

    def mirrored(epoch, index, seed=0):
        pixels = host.host_transform(config, 1, train=True, seed=seed)(ramp, index, epoch).astype(int)
        return bool(pixels[:, -1].mean() < pixels[:, 0].mean())

    first = [mirrored(0, i) for i in range(60)]
    assert 15 < sum(first) < 45 and first != [mirrored(0, i, seed=1) for i in range(60)]
    for epoch in (1, 2, 3):
        assert [mirrored(epoch, i) for i in range(60)] == [one ^ bool(epoch % 2) for one in first]


def supersampled(photo, size, key):
    """The training warp at four times the resolution, averaged."""
    fine = host.random_warp(photo, 4 * size, True, 10.0, key)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(int)


def test_the_training_warp_averages_where_it_shrinks():
    photo = cv2.resize(load_sample_image("china.jpg"), (1600, 1068), interpolation=cv2.INTER_CUBIC)
    matrix_only, ours = [], []
    for i in range(20):
        expected = supersampled(photo, 112, (0, 0, i))
        ours.append(np.abs(host.random_warp(photo, 112, True, 10.0, (0, 0, i)) - expected).mean())
        nearest = cv2.resize(host.random_warp(photo, 448, True, 10.0, (0, 0, i)), (112, 112), interpolation=0)
        matrix_only.append(np.abs(nearest - expected).mean())
    assert np.mean(ours) < 4 and np.mean(ours) < np.mean(matrix_only) / 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_decoding_at_reduced_scale_gives_the_same_picture(orientation):
    photo = cv2.resize(load_sample_image("flower.jpg"), (1600, 1068), interpolation=cv2.INTER_CUBIC)
    jpeg = cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    jpeg = jpeg[:2] + exif(orientation)[2:38] + jpeg[2:]
    whole, reduced = decode(jpeg, 3), 0
    for i in range(20):
        draw = functools.partial(host.draw_crop, flip=True, rotation_degrees=10.0, key=(0, 0, i))
        image, crop, reduction = host.decode_for_crop(jpeg, 3, 224, draw)
        assert crop == draw(*whole.shape[:2])
        reduced += reduction > 1
        assert min(crop.height, crop.width) / reduction > 223 or reduction == 1  # nothing is blown up
        ours = host.warp(image, 224, crop, reduction)
        assert np.abs(ours - supersampled(whole, 224, (0, 0, i))).mean() < 2.5
    assert reduced > 10


def exif_after_a_bad_tag(orientation):
    """A JPEG whose EXIF names the maker at an offset outside the block, which ends OpenCV's reading."""
    tiff = b"II*\0" + struct.pack("<IHHHIIHHIHHI", 8, 2, 0x010F, 2, 9999, 9999, 0x0112, 3, 1, orientation, 0, 0)
    block = b"Exif\0\0" + tiff
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + JPEG[2:]


def test_the_crop_is_drawn_for_the_pixels_that_are_decoded():
    twice = exif(6)[:38] + exif(1)[2:]  # two EXIF blocks, of which the first counts
    for jpeg in (exif_after_a_bad_tag(6), twice, exif(6)):
        whole = decode(jpeg, 3)
        draw = functools.partial(host.draw_crop, flip=True, rotation_degrees=10.0, key=(0, 0, 0))
        image, crop, reduction = host.decode_for_crop(jpeg, 3, 32, draw)
        assert crop == draw(*whole.shape[:2])
        assert image.shape[:2] == tuple(-(-side // reduction) for side in whole.shape[:2])


def unusual_jpegs():
    """Forms of JPEG that are not decoded from the top, or need more of it than the crop's rows."""
    photo = load_sample_image("china.jpg")[..., ::-1]
    yield "plain", cv2.imencode(".jpg", photo)[1].tobytes()
    yield "progressive", cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    yield "restarts", cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_RST_INTERVAL, 7])[1].tobytes()
    yield "grey", cv2.imencode(".jpg", photo[..., 0])[1].tobytes()
    for name in ("411", "420", "422", "440", "444"):
        factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}")
        yield name, cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor])[1].tobytes()


@pytest.mark.parametrize(("name", "jpeg"), list(unusual_jpegs()))
def test_what_is_decoded_of_a_jpeg_makes_no_difference(name, jpeg):
    whole, fewer = decode(jpeg, 3), 0
    for i in range(24):
        draw = functools.partial(host.draw_crop, flip=True, rotation_degrees=180.0 if i % 2 else 30.0, key=(3, 0, i))
        image, crop, reduction = host.decode_for_crop(jpeg, 3, 224, draw)
        fewer += image.shape[0] < whole.shape[0]
        np.testing.assert_array_equal(host.warp(image, 224, crop, reduction), host.warp(whole, 224, crop))
    assert reduction == 1 and (fewer > 0) == (name != "progressive")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_images_of_a_few_rows_are_decoded_for_the_smallest_sizes(size):
    for height in range(1, 17):
        jpeg = cv2.imencode(".jpg", np.random.RandomState(height).randint(0, 256, (height, 9, 3), np.uint8))[1]
        for i in range(4):
            draw = functools.partial(host.draw_crop, flip=True, rotation_degrees=10.0, key=(3, height, i))
            image, crop, reduction = host.decode_for_crop(jpeg.tobytes(), 3, size, draw)
            assert -(-height // reduction) >= image.shape[0] and image.shape[1] == -(-9 // reduction)
            assert image.shape[0] * reduction >= min(crop.bottom, height)
            host.warp(image, size, crop, reduction)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_is_enlarged_as_the_whole_was(channels, monkeypatch):
    draws = np.random.RandomState(channels)
    for _ in range(150):
        height, width = int(draws.randint(1, 40)), int(draws.randint(1, 400))
        image = draws.randint(0, 256, (height, width, channels), np.uint8)
        image = image if draws.rand() < 0.5 else image.transpose(1, 0, 2).copy()
        monkeypatch.setattr(host, "MOST_ENLARGED", 2**40)
        whole = host.central_crop(image, 224, 0.875)
        monkeypatch.setattr(host, "MOST_ENLARGED", 0)
        np.testing.assert_array_equal(host.central_crop(image, 224, 0.875), whole)
