"""That converted weights compute what PyTorch computes is checked by the goldens (tests/test_goldens_models.py)."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hga_flax.errors import UserError
from hga_flax.pretrained.torch_names import PEERS, peer_name
from hga_flax.pretrained.torch_weights import (
    _converted,
    _torch_shape,
    renamed,
    torch_model,
    torch_tensors,
    variables_from_torch,
)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "models.json"


@functools.cache
def shapes() -> dict[str, dict[str, list[int]]]:
    return {key.partition(":")[2]: case["tensors"] for key, case in json.loads(GOLDEN.read_text()).items()}


def zeros(name: str) -> dict[str, np.ndarray]:
    """Returns a state dict of the right names and shapes; broadcast zeros take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes()[name].items()}


@pytest.mark.parametrize(
    ("network", "path", "name"),
    [
        ("resnet50", "stem_norm/mean", "bn1.running_mean"),
        ("resnet50", "stage3_block6/norm2/var", "layer3.5.bn2.running_var"),
        ("resnet50", "stage2_block1/downsample_norm/scale", "layer2.0.downsample.1.weight"),
        ("seresnet50", "stage1_block1/attention/squeeze/bias", "layer1.0.se.fc1.bias"),
        ("skresnext50_32x4d", "stage1_block2/attention/branch2_norm/bias", "layer1.1.conv2.paths.1.bn.bias"),
        ("skresnext50_32x4d", "stage1_block2/attention/select/kernel", "layer1.1.conv2.attn.fc_select.weight"),
        ("googlenet", "inception3a/branch3_reduce/conv/kernel", "inception3a.branch3.0.conv.weight"),
        ("googlenet", "inception5b/branch4/norm/bias", "inception5b.branch4.1.bn.bias"),
        ("densenet121", "block2_layer12/conv1/kernel", "features.denseblock2.denselayer12.conv1.weight"),
        ("densenet121", "transition3_norm/var", "features.transition3.norm.running_var"),
        ("densenet121", "classifier/bias", "classifier.bias"),
        ("resnet18", "stage2_block1/conv2/kernel", "layer2.0.conv2.weight"),
        ("vgg11", "stage3/conv2/bias", "features.8.bias"),
        ("vgg16_bn", "stage1/norm2/var", "features.4.running_var"),
        ("vgg19_bn", "stage5/conv4/kernel", "features.49.weight"),
        ("vgg16_bn", "hidden2/kernel", "classifier.3.weight"),
        ("vgg16_bn", "classifier/bias", "classifier.6.bias"),
        ("res2net50_26w_4s", "stage1_block1/conv2_3/kernel", "layer1.0.convs.2.weight"),
        ("res2net50_26w_4s", "stage1_block1/norm2_3/mean", "layer1.0.bns.2.running_mean"),
        ("res2net50_26w_4s", "stage1_block1/downsample_conv/kernel", "layer1.0.downsample.0.weight"),
        ("res2net50d", "stage1_block1/downsample_conv/kernel", "layer1.0.downsample.1.weight"),
        ("resnest50d", "stem_conv3/kernel", "conv1.6.weight"),
        ("resnest50d", "stem_norm2/var", "conv1.4.running_var"),
        ("resnest50d", "stem_norm3/scale", "bn1.weight"),
        ("resnest50d", "stage1_block1/split_attention/conv/kernel", "layer1.0.conv2.conv.weight"),
        ("resnest50d", "stage1_block1/split_attention/norm/mean", "layer1.0.conv2.bn0.running_mean"),
        ("resnest50d", "stage1_block1/split_attention/reduce_norm/bias", "layer1.0.conv2.bn1.bias"),
        ("resnest50d", "stage1_block1/split_attention/select/bias", "layer1.0.conv2.fc2.bias"),
    ],
)
def test_names(network, path, name):
    assert peer_name(network, tuple(path.split("/"))) == name


def test_axes():
    kernel = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)  # out, in, height, width
    assert _converted(("conv1", "kernel"), kernel)[4, 6, 2, 1] == kernel[1, 2, 4, 6]
    assert _converted(("classifier", "kernel"), kernel[:, :, 0, 0]).shape == (3, 2)
    # An auxiliary head flattens channels, rows, columns there and rows, columns, channels here.
    weight, pooled = (
        np.random.RandomState(0).standard_normal((6, 3 * 16)),
        np.random.RandomState(1).standard_normal((3, 4, 4)),
    )
    ours = pooled.transpose(1, 2, 0).reshape(-1) @ _converted(("auxiliary1", "hidden", "kernel"), weight)
    np.testing.assert_allclose(ours, weight @ pooled.reshape(-1))


@pytest.mark.parametrize("layer", ["hidden", "hidden1", "classifier"])
def test_a_layer_of_an_attention_is_no_head_whatever_it_is_called(layer):
    kernel, wide = np.arange(64 * 8.0).reshape(64, 8), np.arange(2.0 * 3).reshape(1, 1, 2, 3)
    variables = {
        "params": {"stage1_block1": {"attention": {layer: {"kernel": kernel}, "wide": {layer: {"kernel": wide}}}}}
    }
    tensors = torch_tensors(None, variables)
    np.testing.assert_array_equal(tensors[f"stage1_block1.attention.{layer}.weight"], kernel.T)
    places = flatten_dict(variables)
    arrays, left = renamed(None, tensors, places)
    assert not left and all((arrays[path] == places[path]).all() for path in places)


def test_two_variables_of_one_name_are_named():
    variables = {"params": {"attention": {"kernel": np.ones((2, 2)), "scale": np.ones(2)}}}
    message = "attention/kernel and attention/scale would both be called attention.weight in the file"
    with pytest.raises(UserError, match=message):
        torch_tensors(None, variables)


def test_batches_tracked_are_ignored_and_classes_are_read_off():
    tensors = zeros("resnet50") | {
        "bn1.num_batches_tracked": np.array(5),
        "layer1.0.bn1.num_batches_tracked": np.array(5),
    }
    tensors["fc.weight"], tensors["fc.bias"] = np.ones((7, 2048), np.float32), np.arange(7, dtype=np.float32)
    variables = variables_from_torch("resnet50", tensors)
    assert variables["params"]["classifier"]["bias"].tolist() == list(range(7))
    assert set(variables) == {"params", "batch_stats"}


def test_wrong_weights_are_listed():
    tensors = zeros("resnet50")
    del tensors["layer1.0.conv1.weight"]
    tensors["layer9.conv.weight"] = np.zeros(3)
    tensors["bn1.bias"] = np.zeros(65)
    with pytest.raises(UserError) as caught:
        variables_from_torch("resnet50", tensors)
    message = str(caught.value)
    assert "1 missing: layer1.0.conv1.weight" in message
    assert "1 unexpected: layer9.conv.weight" in message
    assert "1 of another shape: bn1.bias [65] instead of [64]" in message


def test_another_networks_weights_are_refused():
    with pytest.raises(UserError, match=r"64 unexpected: .*layer1\.0\.se\.fc1.*and 56 more"):
        variables_from_torch("resnet50", zeros("seresnet50"))
    with pytest.raises(UserError, match="64 missing"):
        variables_from_torch("seresnet50", zeros("resnet50"))


def test_googlenet_with_and_without_auxiliary_heads():
    tensors = zeros("googlenet")
    assert "auxiliary2" in variables_from_torch("googlenet", tensors)["params"]
    main = {key: value for key, value in tensors.items() if not key.startswith("aux")}
    assert "auxiliary2" not in variables_from_torch("googlenet", main)["params"]


def test_densenets_old_names_are_read():
    model = torch_model("densenet121", {}, block_sizes=(1, 1))
    shape = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    layer = {"norm1": 64, "norm2": 128}
    assert {key: shape["params"]["block1_layer1"][key]["scale"].shape[0] for key in layer} == layer
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(shape)):
        keys = tuple(part.key for part in path)[1:]
        new = peer_name("densenet121", keys)
        for i in "12":
            for kind in ("norm", "conv"):
                new = new.replace(f"denselayer1.{kind}{i}.", f"denselayer1.{kind}.{i}.")
        shape_there = leaf.shape[::-1] if leaf.ndim != 4 else (leaf.shape[3], leaf.shape[2], *leaf.shape[:2])
        tensors[new] = np.zeros(shape_there, np.float32)
    assert any(".norm.1." in key for key in tensors)
    assert set(variables_from_torch("densenet121", tensors, model)) == {"params", "batch_stats"}


def test_timms_vgg_is_torchvisions_with_convolutions_for_a_head():
    """Its head reads the whole 7x7 map by a convolution, whose weights flatten to those of the linear layer."""
    model = torch_model("vgg11_bn", {}, features=4, hidden=6, num_classes=3)
    random = np.random.RandomState(0)
    shapes = flatten_dict(dict(jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))))
    tensors = {
        peer_name("vgg11_bn", path[1:]): random.standard_normal(_torch_shape(path, leaf.shape)).astype(np.float32)
        for path, leaf in shapes.items()
    }
    timms = {}
    for key, value in tensors.items():
        for ours, theirs in (("classifier.0", "pre_logits.fc1"), ("classifier.3", "pre_logits.fc2")):
            if key == f"{ours}.weight":
                value = value.reshape(6, -1, *((7, 7) if ours == "classifier.0" else (1, 1)))
            key = key.replace(ours, theirs)
        timms[key.replace("classifier.6", "head.fc")] = value
    assert timms["pre_logits.fc1.weight"].shape == (6, 32, 7, 7)
    for a, b in zip(
        *(jax.tree.leaves(variables_from_torch("vgg11_bn", t, model)) for t in (tensors, timms)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(6, 9 * 4), (6, 4, 3, 3), (6, 4)])
def test_a_vgg_that_flattens_another_map_is_another_shape(shape):
    path = ("params", "hidden1", "kernel")
    arrays, others = renamed("vgg11_bn", {"classifier.0.weight": np.zeros(shape, np.float32)}, [path])
    assert arrays[path].shape == (np.prod(shape[1:]), 6) and not others


def test_an_auxiliary_head_that_flattens_another_map_is_another_shape():
    path = ("params", "auxiliary1", "hidden", "kernel")
    arrays, _ = renamed("googlenet", {"aux1.fc1.weight": np.zeros((10, 9 * 127), np.float32)}, [path])
    assert arrays[path].shape == (9 * 127, 10)


@pytest.mark.parametrize("name", ["resnet50", "seresnet50", "skresnext50_32x4d", "googlenet"])
def test_what_is_written_has_the_peers_names_and_shapes(name):
    tensors = zeros(name)
    model = torch_model(name, tensors)
    abstract = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    written = torch_tensors(name, variables)
    assert {key: list(tensor.shape) for key, tensor in written.items()} == shapes()[name]


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="no PyTorch weights for 'seresnet51'; did you mean 'seresnet5"):
        torch_model("seresnet51", {})


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_can_be_created(name):
    torch_model(name, {})
