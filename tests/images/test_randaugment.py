import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from configs import base
from hga_flax.images import host_augmentation as host
from hga_flax.images import randaugment as ra

PHOTO = cv2.resize(load_sample_image("china.jpg"), (96, 96), interpolation=cv2.INTER_AREA)
GREY = PHOTO[..., :1].copy()


def pillow():
    return pytest.importorskip("PIL.Image", reason="Pillow, the reference, is not installed")


@pytest.mark.parametrize("image", [PHOTO, GREY, (PHOTO // 3 + 40)], ids=["photo", "grey", "dull"])
@pytest.mark.parametrize("name", ra.COLOURS)
def test_colours_are_pillows(name, image):
    image_module = pillow()
    from PIL import ImageEnhance, ImageOps

    reference = image_module.fromarray(image if image.shape[2] == 3 else image[..., 0])
    enhance = {"colour": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    for value in {"posterize": [1, 2, 4], "solarize": [0, 100, 256], "solarize_add": [0, 66, 110]}.get(
        name, [0.1, 0.6, 1.0, 1.9] if name in enhance else [0]
    ):
        ours = ra.COLOURS[name](image, value)
        assert ours.shape == image.shape and ours.dtype == np.uint8
        if name in enhance:
            theirs = getattr(ImageEnhance, enhance[name])(reference).enhance(value)
        elif name == "solarize_add":
            theirs = reference.point([min(255, i + value) if i < 128 else i for i in range(256)] * image.shape[2])
        else:
            arguments = [value] if name in ("posterize", "solarize") else []
            theirs = getattr(ImageOps, name)(reference, *arguments)
        difference = np.abs(ours.astype(int) - np.asarray(theirs).reshape(image.shape))
        assert difference.max() <= (3 if name in enhance else 1), (value, difference.max())
        assert difference.mean() < 0.6


def test_an_image_of_one_colour_stays():
    flat = np.full((8, 8, 3), 77, np.uint8)
    for name in ("autocontrast", "equalize", "sharpness", "contrast"):
        np.testing.assert_array_equal(ra.COLOURS[name](flat, 1.5), flat)


@pytest.mark.parametrize("name", ra.GEOMETRIC)
def test_the_warp_moves_pixels_as_pillow_does(name):
    """timm's functions: a transform of the result by Pillow, about the corner for shears; the inside agrees."""
    image_module = pillow()
    value = {"rotate": 17.0, "shear_x": 0.2, "shear_y": -0.2, "translate_x": 0.25, "translate_y": -0.25}[name]
    matrix = np.array([*ra.GEOMETRIC[name](value), [0, 0, 1]])
    ours = host.warp(PHOTO, 96, host.Crop(0, 0, 96, 96, 0, 1, matrix)).astype(int)
    image = image_module.fromarray(PHOTO)
    bilinear = image_module.Resampling.BILINEAR
    if name == "rotate":
        theirs = image.rotate(value, bilinear)
    else:
        coefficients = {
            "shear_x": (1, value, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, value, 1, 0),
            "translate_x": (1, 0, value * 96, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, value * 96),
        }[name]
        theirs = image.transform(image.size, image_module.Transform.AFFINE, coefficients, bilinear)
    theirs = np.asarray(theirs).astype(int)
    inside = (theirs > 0).all(axis=-1)  # outside Pillow fills with black
    inside &= cv2.erode(inside.astype(np.uint8), np.ones((5, 5))) > 0
    assert inside.mean() > 0.5
    assert np.abs(ours - theirs)[inside].max() <= 8 and np.abs(ours - theirs)[inside].mean() < 1
    assert np.abs(PHOTO.astype(int) - theirs)[inside].mean() > 5


def test_two_geometric_operations_follow_each_other():
    """Against two warps, one after the other; they blur twice."""
    first, second = ([*ra.GEOMETRIC["rotate"](20.0), [0, 0, 1]], [*ra.GEOMETRIC["translate_x"](0.2), [0, 0, 1]])
    warp = lambda image, matrix: host.warp(image, 96, host.Crop(0, 0, 96, 96, 0, 1, np.array(matrix))).astype(int)
    at_once = warp(PHOTO, np.array(first) @ np.array(second))
    in_turn = warp(warp(PHOTO, first).astype(np.uint8), second)
    middle = np.s_[20:76, 20:60]
    assert np.abs(at_once - in_turn)[middle].mean() < 6 < np.abs(at_once - PHOTO)[middle].mean()
    wrong = warp(PHOTO, np.array(second) @ np.array(first))
    assert np.abs(wrong - in_turn)[middle].mean() > 10


def test_the_draws_have_the_frequencies_and_strengths_asked_for():
    drawn = [ra.draw_operations(2, 6.0, (0, 0, i)) for i in range(3000)]
    colours = [operation for operations in drawn for operation in operations.colours]
    counts = {name: sum(n == name for n, _ in colours) for name in ra.COLOURS}
    assert all(150 < count < 250 for count in counts.values()), counts  # 3000 * 2 / 15 / 2 = 200
    moved = sum(operations.matrix is not None for operations in drawn)
    assert moved / 3000 == pytest.approx(1 - (1 - 5 / 15 / 2) ** 2, abs=0.03)
    solarize = [value for name, value in colours if name == "solarize"]
    assert np.mean(solarize) == pytest.approx(256 * 0.4, abs=4) and 8 < np.std(solarize) < 17
    brightness = np.array([value for name, value in colours if name == "brightness"])
    assert np.abs(brightness - 1).mean() == pytest.approx(0.54, abs=0.02)
    assert 0.35 < (brightness > 1).mean() < 0.65
    assert {value for name, value in colours if name == "posterize"} == {2, 3}
    assert all(v == 1 for n, v in ra.draw_operations(900, 10.0, (1,)).colours if n == "posterize")


def transform(train=True, seed=5, channels=3, **overrides):
    data = base.get_config().data
    with data.unlocked():
        data.image_size, data.randaugment_ops = 32, 2
        for key, value in overrides.items():
            data[key] = value
    return host.host_transform(data, channels, train=train, seed=seed)


@pytest.mark.parametrize("augmentation", ["imagenet", "small"])
@pytest.mark.parametrize("image", [PHOTO, GREY], ids=["photo", "grey"])
def test_the_randomness_is_a_function_of_seed_epoch_and_index(augmentation, image):
    make = lambda **options: transform(augmentation=augmentation, channels=image.shape[2], **options)
    ours, again, other, none = make(), make(), make(seed=6), make(randaugment_ops=0)
    before, changed = image.copy(), 0
    for index in range(12):
        result = ours(image, index, 1)
        assert result.shape == (32, 32, image.shape[2]) and result.dtype == np.uint8
        np.testing.assert_array_equal(result, again(image, index, 1))
        changed += (result != none(image, index, 1)).any()
    assert 5 <= changed < 12  # a quarter of the images draws nothing
    np.testing.assert_array_equal(image, before)
    assert any((ours(image, i, 1) != other(image, i, 1)).any() for i in range(8))
    assert any((ours(image, i, 1) != ours(image, i, 2)).any() for i in range(8))


def test_evaluation_and_the_crop_draw_nothing_of_it():
    assert (transform(train=False)(PHOTO, 0, 0) == transform(train=False, randaugment_ops=0)(PHOTO, 0, 0)).all()
    crops = [host.draw_crop(50, 60, True, 10.0, (1, 2, 3)) for _ in range(2)]
    assert crops[0] == crops[1] and crops[0].distortion is None


def test_a_jpeg_is_decoded_as_far_down_as_its_distortion_looks():
    """What is left undecoded would show: the result is that of the whole image."""
    jpeg = cv2.imencode(".jpg", load_sample_image("flower.jpg")[..., ::-1])[1].tobytes()
    whole = {reduction: host.decode(jpeg, 3, reduction) for reduction in host.REDUCTION_FLAGS}
    ours = transform(randaugment_ops=6, randaugment_magnitude=10.0)
    for key in [(5, 0, index) for index in range(60)]:
        operations = ra.draw_operations(6, 10.0, key)
        crop = host.draw_crop(*whole[1].shape[:2], True, 10.0, key, operations.matrix)
        reduction = max(n for n in whole if n == 1 or min(crop.height, crop.width) >= n * 32)
        expected = ra.apply_colours(host.warp(whole[reduction], 32, crop, reduction), operations)
        np.testing.assert_array_equal(ours(jpeg, key[2], 0), expected, err_msg=str(key))
