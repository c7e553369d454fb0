"""That PyTorch computes the same with these files is seen in tests/examples/test_hga_in_pytorch.py."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hga_flax.errors import UserError
from hga_flax.inference import export_weights as weights
from hga_flax.inference.export import metadata
from hga_flax.inference.from_weights import restore_weights
from hga_flax.inference.predictor import Predictor
from hga_flax.inference.to_safetensors import to_safetensors
from hga_flax.models import create_model
from hga_flax.pretrained.torch_names import export_peer
from hga_flax.pretrained.torch_weights import torch_tensors
from hga_flax.training.initial_weights import fit
from hga_flax.training.weights_source import read_weights
from tests.inference.exported import export
from tests.training import tiny

SMALL = {
    "resnet18": {"stage_sizes": (1, 1), "features": 8},
    "resnext50_32x4d": {"stage_sizes": (1, 1)},
    "vgg11_bn": {"features": 4, "hidden": 6},
    "densenet121": {"block_sizes": (2, 1), "growth": 8, "features": 16},
    "googlenet": {"width_divisor": 8, "aux_logits": True},
    "res2net50d": {"stage_sizes": (2, 1)},
    "resnest50d_4s2x40d": {"stage_sizes": (1, 1)},
    "cifar_preact_resnet8": {"features": 4},
}


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        *[(model, "hga") for model in SMALL],
        ("resnet18", "se"),
        ("resnet18", "eca"),
        ("resnext50_32x4d", "sk"),
        ("vgg11_bn", "cbam"),
        ("cifar_preact_resnet8", "se"),
    ],
)
def test_what_is_written_is_read_bit_for_bit(model, attention, tmp_path):
    network = create_model(model, attention=attention, num_classes=3, **SMALL[model])
    abstract = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    random = np.random.RandomState(0)
    value = lambda path, leaf: (abs if path[-1].key == "var" else np.positive)(random.standard_normal(leaf.shape))
    variables = jax.tree_util.tree_map_with_path(lambda *at: value(*at).astype(np.float32), dict(abstract))
    places = flatten_dict(variables)
    file = tmp_path / "w.safetensors"
    file.write_bytes(to_safetensors(torch_tensors(export_peer(model, attention), variables), {"format": "pt"}))
    source = read_weights(str(file), model, places)
    found = fit(source, places, model)
    assert not found.fresh and not found.unused and found.loaded.keys() == places.keys()
    for path, array in places.items():
        assert np.ascontiguousarray(found.loaded[path]).tobytes() == array.tobytes(), path


def header(file):
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


@pytest.mark.medium
def test_a_run_becomes_a_file_from_which_a_run_can_start(workdir, tmp_path, capsys):
    file = tmp_path / f"{'n' * 243}.safetensors"  # as long as a name can be
    export(workdir, "safetensors", file)
    printed = " ".join(capsys.readouterr().out.split())
    assert "this project's own: neither torchvision nor timm has cifar_resnet8" in printed
    assert "arrays read back bit for bit" in printed
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    entries = header(file)
    facts = {key: json.loads(value) for key, value in entries.pop("__metadata__").items() if key != "format"}
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert facts["names"] == {"network": None, "of": [], "whole_network": False}
    assert facts["attention_options"] == {} and facts["model_options"] == {"features": 4}
    assert facts["normalisation"] == {"in_the_graph": False, "mean": [0.5], "std": [0.25]}
    assert entries["stem_conv.weight"]["shape"][1:] == [1, 3, 3]
    assert entries["stage1_block1.attention.mfe.kernel_7"]["shape"][1:] == [1, 7, 7]
    ours = flatten_dict(dict(jax.device_get(Predictor.from_workdir(str(workdir)).variables)))
    arrays = read_weights(str(file), "cifar_resnet8", ours).arrays
    assert arrays.keys() == ours.keys()
    assert all(np.array_equal(arrays[path], ours[path]) for path in ours)
    run, again = Predictor.from_workdir(workdir), Predictor.from_weights(file, "cifar_resnet8", "hga")
    images = tiny.held_out_digits()[0][:8]  # encoded: decoded, sized and normalised as the file says
    assert again.class_names == run.class_names and again.restored.known.mean == (0.5,)
    np.testing.assert_allclose(again.predict(images), run.predict(images), rtol=1e-5)


@pytest.mark.medium
def test_options_that_change_no_array_are_those_of_the_file(tmp_path):
    """ResNet-D's average pooling has no parameters: without it the file would be read, and mean another network."""
    options = ["--config.model.options=average_down=True", "--config.data.image_size=32"]
    source = restore_weights(resnet18_file(tmp_path), "resnet18", overrides=options)
    file = tmp_path / "d.safetensors"
    weights.write_weights(Predictor(source), file, metadata(Predictor(source)))
    again = restore_weights(file, "resnet18")
    assert again.experiment.config.model.options == "average_down=True"
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(Predictor(again).predict(images), Predictor(source).predict(images))
    plain = restore_weights(file, "resnet18", overrides=["--config.model.options="])
    assert np.abs(Predictor(plain).predict(images) - Predictor(source).predict(images)).max() > 1e-6


def resnet18_file(folder):
    model = create_model("resnet18", num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    tensors = torch_tensors("resnet18", jax.tree.map(np.asarray, dict(variables)))
    (folder / "plain.safetensors").write_bytes(to_safetensors(tensors, {"format": "pt"}))
    return folder / "plain.safetensors"


def test_bad_input(workdir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the name must end in \.safetensors"):
        export(workdir, "safetensors", tmp_path / "network.bin")
    monkeypatch.setattr(
        weights, "to_safetensors", lambda tensors, facts: to_safetensors(dict(list(tensors.items())[1:]), facts)
    )
    with pytest.raises(UserError, match="does not reproduce the checkpoint's weights; nothing was written"):
        export(workdir, "safetensors", tmp_path / "network.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {"average_down": True}), ("googlenet", {"transform_input": True})]
)
def test_only_a_network_that_computes_the_same_gets_its_peers_name(name, options):
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    for given, same in (({"dtype": "bfloat16"}, True), (options, False)):
        model = create_model(name, num_classes=10, **given)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        predictor = SimpleNamespace(
            restored=SimpleNamespace(experiment=SimpleNamespace(model=model)),
            variables=variables,
            image_shape=(9, 9, 3),
        )
        classes = {"fc.bias": np.zeros(10, np.float32)}
        assert weights._has_same_arrays(name, classes, variables, 3)  # average_down and its like change no shape
        assert weights._is_same_network(name, classes, predictor) is same


@pytest.mark.parametrize(
    ("name", "channels", "described"),
    [
        ("vgg11", 3, "torchvision's vgg11: torchvision.models.vgg11(num_classes=7)"),
        ("vgg11", 1, "torchvision's vgg11"),
        ("resnet18", 1, "torchvision's and timm's resnet18: timm.create_model('resnet18', num_classes=7, in_chans=1)"),
        (
            "googlenet", 3, "torchvision's googlenet: "
            "torchvision.models.googlenet(num_classes=7, aux_logits=True, init_weights=False)",
        ),
    ],
)  # fmt: skip
def test_the_call_that_makes_the_network_in_pytorch(name, channels, described):
    model = SimpleNamespace(aux_logits=True)
    experiment = SimpleNamespace(config=tiny.config(model__name=name), model=model)
    restored = SimpleNamespace(experiment=experiment)
    predictor = SimpleNamespace(restored=restored, class_names=[str(i) for i in range(7)], image_shape=(9, 9, channels))
    assert weights._described(name, True, predictor) == described
