"""A public CIFAR ResNet as its own program computes it, and as ours does with its weights.

That two real checkpoints give PyTorch's logits is checked by `python -m tests.goldens cifar`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from hga_flax.errors import UserError
from hga_flax.models import create_model
from hga_flax.pretrained.cifar_weights import BOTH_SIDES, cifar_peers
from hga_flax.pretrained.torch_weights import _torch_shape, peer_name
from hga_flax.training.initial_weights import fit
from hga_flax.training.weights_source import read_weights
from tests import torch_writer
from tests.goldens_models import rule_tensor
from tests.training.test_initial_weights import places

DEPTH, WIDTH = 14, 4


def small(shortcut):
    return places(f"cifar_resnet{DEPTH}", channels=3, features=WIDTH, shortcut=shortcut)


def state_dict(peer, shortcut, prefix=""):
    """Rule-made weights by the peer's names; of a small network, so that the sums stay small too."""
    shapes = {peer_name(peer, path[1:]): _torch_shape(path, leaf.shape) for path, leaf in small(shortcut).items()}
    return {prefix + name: rule_tensor(name, list(shape)).astype(np.float32) for name, shape in shapes.items()}


def reference(tensors, images):
    """The program's network in float64, images `[B, 3, H, W]`: He et al., section 4.2, zeros on both sides."""

    def conv(x, name, stride=1):
        kernel = tensors[f"{name}.weight"].astype(np.float64)
        pad = [(kernel.shape[2] // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad)

    def norm(x, name):
        mean, var, scale, bias = (
            tensors[f"{name}.{leaf}"].astype(np.float64)[:, None, None]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(norm(conv(images, "conv1"), "bn1"))
    for stage in range(3):
        for block in range((DEPTH - 2) // 6):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            y = jax.nn.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
            y = norm(conv(y, f"{name}.conv2"), f"{name}.bn2")
            if stride == 2:
                if f"{name}.shortcut.0.weight" in tensors:
                    x = norm(conv(x, f"{name}.shortcut.0", 2), f"{name}.shortcut.1")
                else:
                    quarter = y.shape[1] // 4
                    x = jnp.pad(x[:, :, ::2, ::2], ((0, 0), (quarter, quarter), (0, 0), (0, 0)))
            x = jax.nn.relu(x + y)
    return x.mean(axis=(2, 3)) @ tensors["linear.weight"].T.astype(np.float64) + tensors["linear.bias"]


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_logits_are_those_of_the_program(shortcut, tmp_path):
    tensors = state_dict(f"{BOTH_SIDES}resnet{DEPTH}", shortcut)
    file = torch_writer.save_legacy(
        {"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "best_prec1": 91.7}, tmp_path / "resnet14.th"
    )
    there = small(shortcut)
    found = fit(read_weights(str(file), f"cifar_resnet{DEPTH}", there), there, "ours")
    assert not found.fresh and not found.unused
    images = np.random.RandomState(0).standard_normal((2, 3, 16, 16))
    with jax.enable_x64(True):
        expected = np.asarray(reference(tensors, images))
        model = create_model(
            f"cifar_resnet{DEPTH}", num_classes=10, features=WIDTH, shortcut=shortcut, dtype=jnp.float64
        )
        variables = jax.tree.map(lambda x: np.asarray(x, np.float64), unflatten_dict(dict(found.loaded)))
        ours = np.asarray(jax.jit(model.apply)(variables, images.transpose(0, 2, 3, 1)))
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-6  # the global mean is float32's


def test_the_other_family(tmp_path):
    tensors = state_dict(f"pytorch-cifar-models/cifar_resnet{DEPTH}", "B")
    assert "layer2.0.downsample.0.weight" in tensors and "fc.bias" in tensors
    there = small("B")
    found = fit(read_weights(str(torch_writer.save(tensors, tmp_path / "w.pt")), "cifar_resnet14", there), there, "x")
    assert not found.fresh and not found.unused and found.origin.endswith("pytorch-cifar-models/cifar_resnet14")


def test_the_part_of_a_file_can_be_named(tmp_path):
    """The file has no names of ours, nor of the other sources of CIFAR networks, under this key or another."""
    raw, there = state_dict(f"pytorch-cifar-models/cifar_resnet{DEPTH}", "B"), small("B")
    average = {name: value + 1 for name, value in raw.items()}
    file = torch_writer.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "two.pth")
    for key, shift in (("", 1), ("@state_dict", 0), ("@state_dict_ema", 1)):
        found = fit(read_weights(f"{file}{key}", "cifar_resnet14", there), there, "cifar_resnet14")
        np.testing.assert_array_equal(found.loaded["params", "stem_norm", "scale"], raw["bn1.weight"] + shift)
    with pytest.raises(UserError, match="nothing under 'net' fits; it has state_dict "):
        read_weights(f"{file}@net", "cifar_resnet14", there)


def test_a_network_with_other_shortcuts_is_told_the_option(tmp_path):
    file = torch_writer.save(state_dict(f"{BOTH_SIDES}resnet{DEPTH}", "A"), tmp_path / "w.th")
    there = small("B")
    with pytest.raises(
        UserError, match=r"its shortcuts have no parameters: set config\.model\.options to \"shortcut='A'"
    ):
        fit(read_weights(str(file), "cifar_resnet14", there), there, "cifar_resnet14")


def fitted(tensors, folder):
    there = small("A")
    file = torch_writer.save(tensors, folder / "w.th")
    return fit(read_weights(str(file), "cifar_resnet14", there), there, "cifar_resnet14")


@pytest.mark.parametrize("inputs", [4 * WIDTH - 1, 16 * WIDTH])
def test_a_head_of_another_width_is_not_cut_to_size(inputs, tmp_path):
    tensors = state_dict(f"{BOTH_SIDES}resnet{DEPTH}", "A")
    found = fitted(tensors | {"linear.weight": np.ones((10, inputs), np.float32)}, tmp_path)
    assert sorted(found.fresh) == sorted(found.unused) == ["classifier/bias", "classifier/kernel"]


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("layer3.1.conv2.weight", (24, 16, 3, 3), r"stage3_block2/conv2/kernel \[3, 3, 16, 24\] instead of"),
        ("layer2.0.bn2.running_mean", (9,), r"stage2_block1/norm2/mean \[9\] instead of \[8\]"),
        ("layer2.1.conv1.weight", (8, 6, 3, 3), r"stage2_block2/conv1/kernel \[3, 3, 6, 8\] instead of"),
        ("layer1.0.conv1.weight", (4,), r"stage1_block1/conv1/kernel \[4\] instead of"),
        ("conv1.weight", (), r"stem_conv/kernel \[\] instead of"),
    ],
)
def test_other_widths_are_refused(name, shape, problem, tmp_path):
    tensors = state_dict(f"{BOTH_SIDES}resnet{DEPTH}", "A")
    with pytest.raises(UserError, match=problem):
        fitted(tensors | {name: np.ones(shape, np.float32)}, tmp_path)


def test_which_networks_have_public_weights():
    assert len(cifar_peers("cifar_resnet110")) == len(cifar_peers("cifar_resnet1202")) == 2
    assert not cifar_peers("cifar_preact_resnet110") and not cifar_peers("cifar_resnet164_bottleneck")
