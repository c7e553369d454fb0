import io
import os
import re

import cv2
import jax
import numpy as np
import pytest

from hga_flax.config.loading import to_json
from hga_flax.errors import UserError
from hga_flax.images.bad_images import BadImage
from hga_flax.inference.predictor import Predictor, find_images
from hga_flax.training.restore import evaluate_workdir
from tests.training import tiny


@pytest.fixture(scope="module")
def predictor(workdir):
    return Predictor.from_workdir(workdir, "latest", batch_size=64)


@pytest.fixture(scope="module")
def split():
    return tiny.held_out_digits()


@pytest.mark.medium
def test_every_image_of_the_split_is_labelled_as_evaluation_labels_it(workdir, predictor, split):
    images, labels = split
    probabilities = predictor.predict(images)
    measured = evaluate_workdir(str(workdir), "latest")
    assert measured["num_examples"] == len(images) == 297
    assert 100 * (probabilities.argmax(axis=1) != labels).mean() == pytest.approx(measured["top1_error"])
    assert -np.log(probabilities[np.arange(297), labels]).mean() == pytest.approx(measured["loss"], rel=1e-5)
    assert measured["top1_error"] < 80  # it has learned something, and what is right differs from image to image
    pixels = np.stack([cv2.imdecode(np.frombuffer(i, np.uint8), cv2.IMREAD_GRAYSCALE) for i in images])[..., None]
    model = jax.jit(predictor.restored.experiment.model.apply)
    logits = model(predictor.variables, (pixels / 255.0 - 0.5) / 0.25)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)


def test_files_bytes_and_arrays_are_the_same_image(predictor, split, tmp_path):
    image = split[0][5]
    (tmp_path / "five.png").write_bytes(image)
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)[..., None]
    rows = predictor.predict([image, pixels, tmp_path / "five.png", str(tmp_path / "five.png")])
    assert rows.shape == (4, 10) and (rows == rows[0]).all()
    assert predictor.predict([]).shape == (0, 10)
    for one in (image, pixels, tmp_path / "five.png", str(tmp_path / "five.png")):
        np.testing.assert_allclose(predictor.predict(one), rows[:1], rtol=1e-5)
    np.testing.assert_allclose(predictor.predict(pixels[None]), rows[:1], rtol=1e-5)

    class Picture:  # as Pillow's images do
        def __array__(self, dtype=None, copy=None):
            return pixels

    class NewPicture:  # as those of Pillow 13 do
        __array_interface__ = np.ascontiguousarray(pixels).__array_interface__
        kept = pixels

    new = NewPicture(), [NewPicture()]
    for array in (jax.numpy.asarray(pixels), jax.numpy.asarray(pixels)[None], Picture(), [Picture()], *new):
        np.testing.assert_allclose(predictor.predict(array), rows[:1], rtol=1e-5)


def test_a_bad_image_is_told_in_its_place_and_moves_no_other(predictor, split, tmp_path):
    good = split[0][:3]
    bad = [
        b"no image",
        tmp_path / "absent.png",
        str(tmp_path / "*.gif"),
        tmp_path,
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((8, 8, 1)),
        np.zeros((0, 8, 1), np.uint8),
        3,
    ]
    answers = list(predictor.stream([good[0], *bad, *good[1:]]))
    assert [image for image, _ in answers] == [good[0], *bad, *good[1:]]
    told = [str(answer) for _, answer in answers[1:9]]
    expected = (
        "cannot be decoded",
        "No such file",
        "no file matches this pattern",
        "folder without images",
        "uint8 [8, 8, 3] is",
        "float64 [8, 8, 1] is",
        "uint8 [0, 8, 1] is",
        "int is not a file name, an encoded image (bytes) or an array",
    )
    assert all(part in message for part, message in zip(expected, told, strict=True))
    np.testing.assert_allclose([answers[i][1] for i in (0, 9, 10)], predictor.predict(good), rtol=1e-5)
    assert issubclass(BadImage, UserError)
    for images, message in (
        ([good[0], b"no image"], r"^image 1 \(from 0\): .*cannot be decoded"),
        (tmp_path / "absent.png", f"^{tmp_path}/absent.png: No such file"),
    ):
        with pytest.raises(BadImage, match=message):
            predictor.predict(images)


@pytest.mark.parametrize(
    ("mode", "exif", "message"),
    [("L", {274: 6}, "that its EXIF data turn: use PIL"), ("YCbCr", {}, "in mode YCbCr: convert it to RGB first")],
)
def test_an_image_of_pillows_whose_pixels_alone_say_the_wrong_thing_is_refused(predictor, split, mode, exif, message):
    class Picture:  # as Pillow's are
        def __init__(self, mode, exif):
            self.mode, self.getexif = mode, lambda: exif

        def __array__(self, dtype=None, copy=None):
            return pixels

    pixels = cv2.imdecode(np.frombuffer(split[0][5], np.uint8), cv2.IMREAD_GRAYSCALE)[..., None]
    np.testing.assert_array_equal(predictor.load(Picture("L", {274: 1})), predictor.load(pixels))
    with pytest.raises(BadImage, match=message):
        predictor.load(Picture(mode, exif))


def test_many_images_are_read_as_they_are_needed(predictor, split):
    read = 0

    def images():
        nonlocal read
        for i in range(2000):
            read += 1
            yield split[0][i % 297]

    stream = predictor.stream(images())
    next(stream)
    assert read <= 4 * predictor.batch_size
    answers = [next(stream)[1] for _ in range(500)]
    assert read <= 501 + 4 * predictor.batch_size
    stream.close()
    np.testing.assert_allclose(answers, predictor.predict(split[0] * 2)[1:501], rtol=1e-5)


def test_few_images_are_one_small_batch_and_all_batches_are_one_size(predictor, split):
    def sizes(count):
        seen, step = [], predictor._step
        predictor._step = lambda variables, images: seen.append(len(images)) or step(variables, images)
        try:
            assert len(list(predictor.stream(split[0][:count]))) == count
        finally:
            predictor._step = step
        return seen

    devices = jax.device_count()
    assert sizes(1) == [devices] and sizes(devices + 1) == [2 * devices]
    assert sizes(150) == [64, 64, 64]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "notes.txt", "[odd].png", "deep/er/c.webp", "deep/.hidden/d.png", "none/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["b.png", "notes.txt", "b.png"], ["b.png", "notes.txt", "b.png"]),
        (["*.png"], ["[odd].png", "b.png"]),
        (["[odd].png"], ["[odd].png"]),
        (["**/*.webp"], ["deep/er/c.webp"]),
        (["deep"], ["deep/er/c.webp"]),
        (["."], ["./[odd].png", "./a.JPG", "./b.png", "./deep/er/c.webp"]),
        (["absent.png", "*.gif", "none"], ["absent.png", "*.gif", "none"]),
        (["b.png", "-", "a.JPG"], ["b.png", "deep/er/c.webp", "b.png", "a.JPG"]),
    ],
)
def test_what_arguments_mean(tree, arguments, found):
    listing = io.StringIO("d*p\n\n-\nb.png\r\n")
    assert [name.replace(os.sep, "/") for name in find_images(arguments, listing)] == found


def test_errors_speak_to_who_writes_python(tmp_path):
    (tmp_path / "config.json").write_text(to_json(tiny.config()))
    (tmp_path / "dataset.json").write_text('{"name": "digits", "num_classes": 10, "channels": 1, "class_names": []}')
    for call, message in (
        (lambda: Predictor.from_workdir(str(tmp_path / "nope")), "nope: no run here (there is no config.json)"),
        (lambda: Predictor.from_workdir(str(tmp_path), batch_size=0), "batch_size=0: must be at least 1"),
        (lambda: Predictor.from_workdir(str(tmp_path), weights="ema"), "weights=ema: this run keeps no average"),
        (lambda: Predictor.from_workdir(str(tmp_path)), f"{tmp_path}: no checkpoint here yet"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            call()
        assert "--" not in str(caught.value)


def test_folders_and_patterns_are_for_the_command_which_names_their_files(predictor, split, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "five.png").write_bytes(split[0][5])
    (tmp_path / "empty").mkdir()
    photos, five = tmp_path / "photos", tmp_path / "photos/five.png"
    for given, message in (
        (photos, f"{photos}: a folder; name the images in it, such as {five}"),
        (f"{photos}/*.png", f"{photos}/*.png: a pattern; name the files, such as {five}"),
        (tmp_path / "empty", f"{tmp_path}/empty: a folder without images (.jpg, "),
        (f"{photos}/*.jpg", f"{photos}/*.jpg: no file matches this pattern"),
    ):
        with pytest.raises(BadImage, match=f"^{re.escape(message)}"):
            predictor.predict(given)


def test_the_program_may_have_set_a_mesh_of_its_own(predictor, split):
    expected = predictor.predict(split[0][:3])
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("model",))):
        np.testing.assert_array_equal(predictor.predict(split[0][:3]), expected)


def test_a_listing_need_not_be_utf_8(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    listing = io.TextIOWrapper(io.BytesIO(name + b"\n"), encoding="utf-8")
    assert [os.fsencode(file) for file in find_images(["-"], listing)] == [name]
