import importlib.util
import json
import math
import os
import shutil
import sys
from collections import Counter

import jax
import numpy as np
import optax
import pytest

from hga_flax.data.sources import dataset_info
from hga_flax.errors import UserError
from hga_flax.images.device_augmentation import normalize
from hga_flax.inference import export as command
from hga_flax.inference.predictor import Predictor
from hga_flax.inference.to_stablehlo import load
from hga_flax.processes.mesh import replicate
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.workdir import write_config, write_dataset
from hga_flax.training.experiment import create_experiment
from hga_flax.training.state import abstract_state
from tests.commands import run
from tests.inference.exported import export
from tests.training import tiny

FORMATS = [
    "stablehlo",
    pytest.param(
        "onnx",
        marks=pytest.mark.skipif(
            not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))),
            reason="the ONNX packages are not installed: pip install onnx onnxruntime",
        ),
    ),
]


def serve(file, form, images):
    """Returns the results and the metadata of an exported file."""
    if form == "stablehlo":
        return load(file.read_bytes())(images), json.loads(file.with_name(file.name + ".json").read_text())
    import onnx

    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    return command._session(file)(images), facts


@pytest.mark.medium
@pytest.mark.parametrize("form", FORMATS)
def test_the_file_gives_the_checkpoints_logits_for_raw_images(workdir, tmp_path, capsys, form):
    file = tmp_path / f"network.{form}"
    export(workdir, form, file)
    printed = " ".join(capsys.readouterr().out.split())
    assert "images uint8 [batch, 8, 8, 1]" in printed and "logits on 16 images of 'test' differ by" in printed
    assert {path.name for path in tmp_path.iterdir()} <= {file.name, file.name + ".json"}
    predictor = Predictor.from_workdir(str(workdir))
    images = np.stack([predictor.load(image) for image in tiny.held_out_digits()[0][:37]])
    results, facts = serve(file, form, images)
    normalised = normalize(images, (0.5,), (0.25,))
    logits = jax.jit(predictor.restored.experiment.model.apply)(predictor.variables, normalised)
    np.testing.assert_allclose(results["logits"], logits, rtol=1e-4, atol=1e-4 * abs(logits).max())
    np.testing.assert_allclose(results["probabilities"], jax.nn.softmax(logits), atol=1e-5)
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert facts["preprocessing"] == {
        "height": 8, "width": 8, "channels": "grey", "short_side": None, "crop_fraction": None,
    }  # fmt: skip
    assert facts["normalisation"]["mean"] == [0.5] and facts["source"]["step"] == predictor.restored.step


@pytest.mark.skipif(not importlib.util.find_spec("onnx"), reason="onnx is not installed")
def test_hga_is_products_of_matrices(workdir, tmp_path):
    import onnx

    export(workdir, "onnx", tmp_path / "network.onnx")
    nodes = onnx.load(tmp_path / "network.onnx").graph.node
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    # The stem, three blocks of two and two shortcuts, each with its bias; HGA's kernels are none of them.
    assert len(convolutions) == 9 and all(len(node.input) == 3 for node in convolutions)
    groups = {a.i for node in convolutions for a in node.attribute if a.name == "group"}
    assert groups == {1} and sum(node.op_type == "Einsum" for node in nodes) >= 3
    counts = Counter(node.op_type for node in nodes)
    assert counts["Sub"] == counts["Exp"] == 1  # the softmax; of the norms nothing is left
    assert not counts["BatchNormalization"] + counts["Sqrt"] + counts["Pow"]


@pytest.mark.medium
def test_a_network_that_differs_is_not_written(workdir, tmp_path, monkeypatch):
    file = tmp_path / "network"
    export(workdir, "stablehlo", file)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    off = lambda network, images: lambda x: {name: value * 1.001 for name, value in network(x).items()}
    monkeypatch.setattr(command, "fold", off)
    with pytest.raises(UserError, match=r"differ from the checkpoint's by .*e-0\d of the largest"):
        export(workdir, "stablehlo", file)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_classifier_that_starts_at_zero_equals_itself(tmp_path, monkeypatch):
    zero = lambda images: {"logits": np.zeros((len(images), 3), np.float32)}
    monkeypatch.setattr(command, "check_images", lambda predictor: (np.zeros((2, 8, 8, 3), np.uint8), "images"))
    monkeypatch.setattr(command, "load", lambda content: zero)
    file = tmp_path / "network"
    file.touch()
    assert command.compare(None, zero, file, "stablehlo") == (0.0, "images")


def test_without_the_data_set_synthetic_images_are_compared_and_named(workdir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    info = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(info | {"name": "cifar10"}))
    export(copy, "stablehlo", tmp_path / "network", f"--data-dir={tmp_path / 'nothing'}", "--checkpoint=latest")
    assert "on 16 synthetic images (the data set is not available)" in " ".join(capsys.readouterr().out.split())


def test_a_link_is_followed_and_a_device_is_not_replaced(workdir, tmp_path):
    (tmp_path / "current").symlink_to(tmp_path / "first")
    export(workdir, "stablehlo", tmp_path / "current")
    assert (tmp_path / "current").is_symlink() and (tmp_path / "first").is_file()
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match=rf"^--out={out}: is a device or a pipe, not a file$"):
            export(workdir, "stablehlo", out)
    assert (tmp_path / "pipe").is_fifo()


def test_bad_input(workdir, tmp_path, monkeypatch):
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "does not exist")):
        with pytest.raises(UserError, match=message):
            export(workdir, "stablehlo", out)
    with pytest.raises(UserError, match="no run here"):
        export(tmp_path, "stablehlo", tmp_path / "file")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install onnx$"):
        export(workdir, "onnx", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def hga_resnet50(tmp_path_factory):
    """A run of HGA-ResNet-50 with random weights and statistics, which compiles no training step."""
    folder = tmp_path_factory.mktemp("resnet50")
    c = tiny.config(model__name="resnet50", model__options="", data__image_size=224, training__batch_size=8)
    info = dataset_info("digits")
    experiment = create_experiment(c, info)
    shapes = abstract_state(experiment.init(experiment.optimizer(optax.constant_schedule(0.0))), experiment.mesh)
    random = np.random.default_rng(0)

    def draw(path, x):
        if getattr(path[-1], "key", "") in ("var", "scale"):
            return random.uniform(0.5, 1.5, x.shape).astype(x.dtype)
        fan_in = max(1, math.prod(x.shape[:-1])) if x.ndim > 1 else 10
        return (random.normal(size=x.shape) / math.sqrt(fan_in)).astype(x.dtype)

    checkpoints = Checkpoints(folder)
    state = replicate(jax.tree.map_with_path(draw, shapes), experiment.mesh)
    checkpoints.save(1, state, {}, None)
    checkpoints.wait()
    checkpoints.close()
    write_config(folder, c)
    write_dataset(folder, info)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_hga_resnet50(hga_resnet50, tmp_path, form):
    workdir = hga_resnet50
    file = tmp_path / "network"
    export(workdir, form, file, "--checkpoint=latest")
    assert file.stat().st_size > 4 * 23e6
    predictor = Predictor.from_workdir(str(workdir), "latest", batch_size=8)
    images, _ = command.check_images(predictor)
    logits = command.inference_network(predictor)(images[:3])["logits"]
    if form == "stablehlo":  # in a process that has read nothing but the file
        np.save(tmp_path / "images.npy", images[:3])
        program = (
            "import sys, numpy; from jax import export; file, images, out = sys.argv[1:]\n"
            "program = export.deserialize(bytearray(open(file, 'rb').read()))\n"
            "numpy.save(out, program.call(numpy.load(images))['logits'])"
        )
        done = run("-c", program, file, tmp_path / "images.npy", tmp_path / "logits.npy")
        assert done.returncode == 0, done.stderr
        found = np.load(tmp_path / "logits.npy")
    else:
        import onnx

        found = command._session(file)(images[:3])["logits"]
        nodes = onnx.load(file).graph.node
        convolutions = [node for node in nodes if node.op_type == "Conv"]
        groups = {a.i for node in convolutions for a in node.attribute if a.name == "group"}
        assert len(convolutions) == 53 and groups == {1}  # ResNet-50's own, none of HGA's
    assert abs(found - logits).max() / abs(logits).max() < 1e-4
