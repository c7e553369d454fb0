import importlib.util
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from hga_flax.images.host_augmentation import central_crop, resize
from hga_flax.inference.predictor import Predictor
from tests.commands import ROOT
from tests.images.test_decoding import TURNED
from tests.inference.exported import export
from tests.training import tiny

SCRIPT = ROOT / "examples" / "serve_onnx.py"
pytest.importorskip("onnxruntime", reason="the ONNX packages are not installed: pip install onnx onnxruntime")


def serve(*arguments, without=()):
    """Runs the example where some packages refuse to be imported."""
    path = os.pathsep.join(map(str, without))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def load():
    spec = importlib.util.spec_from_file_location("serve_onnx", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.fixture
def without(tmp_path):
    for name in ("jax", "flax", "hga_flax", "onnx", "tensorflow", "torch"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text(f"raise ImportError('{name} is blocked here')\n")
    return [tmp_path / "blocked"]


@pytest.mark.medium
def test_it_labels_images_as_the_predictor_does(tmp_path, without):
    workdir = tmp_path / "run"
    tiny.train_on_digits(workdir)
    export(workdir, "onnx", tmp_path / "network.onnx")
    files = []
    for i, image in enumerate(tiny.held_out_digits()[0][:40]):
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(image)
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "empty.png").write_bytes(b"")
    bad = tmp_path / "bad.png", tmp_path / "empty.png"
    done = serve(tmp_path / "network.onnx", *files[:2], *bad, *files[2:], "--top=1", without=without)
    reasons = "not an image that OpenCV reads", "the file is empty"
    assert done.returncode == 1
    assert done.stderr == "".join(f"{file}: {why}\n" for file, why in zip(bad, reasons, strict=True))
    rows = Predictor.from_workdir(str(workdir)).predict(files)
    expected = [f"{file}  {row.argmax()} {row.max():.2%}" for file, row in zip(files, rows, strict=True)]
    assert done.stdout.splitlines() == expected


def test_a_network_that_cannot_be_read_is_one_line(tmp_path, without):
    (tmp_path / "text.onnx").write_text("no network")
    for file in (tmp_path / "nope.onnx", tmp_path / "text.onnx"):
        done = serve(file, "x.png", without=without)
        assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {file} cannot be read: ")


def test_a_network_of_another_maker_is_one_line(tmp_path, without):
    helper = pytest.importorskip("onnx.helper")
    info = [helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", info[:1], info[1:])
    file = tmp_path / "foreign.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file.write_bytes(model.SerializeToString())
    done = serve(file, "x.png", without=without)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"error: {file} does not say how to prepare its images: hga_flax did not export it\n")


def test_help(without):
    done = serve("--help", without=without)
    assert done.returncode == 0 and "--top" in done.stdout and "ONNX Runtime" in done.stdout


@pytest.mark.parametrize("size", [(40, 60), (300, 200), (20, 33)])
@pytest.mark.parametrize("channels", ["RGB", "grey"])
def test_its_pixels_are_those_of_evaluation(tmp_path, size, channels):
    example = load()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    if channels == "grey":
        pixels = pixels[:, :, :1]
    file = tmp_path / "image.png"
    cv2.imwrite(str(file), pixels[:, :, ::-1])
    how = json.loads(json.dumps({"height": 28, "width": 28, "channels": channels, "short_side": 32}))
    np.testing.assert_array_equal(example.read_image(str(file), how), central_crop(pixels, 28, 0.875))
    how["short_side"] = None
    np.testing.assert_array_equal(example.read_image(str(file), how), resize(pixels, 28, 28))


@pytest.mark.parametrize(
    "data",
    [
        TURNED,
        b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nTUPLTYPE GRAYSCALE\nENDHDR\n\0",
        b"P5 1 1 4095\n\x0f\xff",
        cv2.imencode(".tiff", np.zeros((2, 2, 4), np.uint8))[1].tobytes(),
    ],
)
def test_formats_that_opencv_shows_wrongly_are_refused(tmp_path, data):
    file = tmp_path / "image"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="AVIF, TIFF, PGM and their like are not read here; convert it to PNG or JPEG"):
        load().read_image(str(file), {"height": 8, "width": 8, "channels": "RGB", "short_side": None})
