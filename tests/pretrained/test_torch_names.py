"""Names of layers; that whole networks have torchvision's and timm's is seen in test_torch_weights.py."""

import pytest

from hga_flax.models import model_names
from hga_flax.pretrained.torch_names import (
    PEERS,
    export_peer,
    libraries,
    new_name,
    no_peer,
    peer_name,
    peers_of,
    wrapped_advice,
)


@pytest.mark.parametrize(
    ("network", "path", "name"),
    [
        ("resnet50", "stage1_block1/attention/mfe/kernel_7", "layer1.0.attention.mfe.kernel_7"),
        ("resnet50", "stage1_block1/attention/reduce/kernel", "layer1.0.attention.reduce.weight"),
        ("resnet50", "stage1_block1/attention/restore_norm/mean", "layer1.0.attention.restore_norm.running_mean"),
        ("vgg16", "stage2/attention/ee/excite", "stage2.attention.ee.excite"),
        ("densenet121", "block1_layer2/attention/ee/excite", "features.denseblock1.denselayer2.attention.ee.excite"),
        ("seresnet50", "stage1_block1/attention/squeeze/kernel", "layer1.0.se.fc1.weight"),
        (None, "stage1_block1/conv1/kernel", "stage1_block1.conv1.weight"),
        (None, "classifier/bias", "classifier.bias"),
    ],
)
def test_names_beside_the_peers(network, path, name):
    assert peer_name(network, tuple(path.split("/"))) == name


def test_a_network_is_written_under_the_names_that_fit_it_best():
    assert export_peer("resnet50", "se") == "seresnet50"
    assert export_peer("resnet50", "hga") == export_peer("resnet50", "none") == "resnet50"
    assert export_peer("resnext50_32x4d", "sk") == "skresnext50_32x4d"
    assert export_peer("cifar_resnet20", "hga") is None and peers_of("cifar_resnet20") == []
    assert no_peer("resnet51").startswith("neither torchvision nor timm has a 'resnet51'; did you mean 'resnet5")


def test_every_network_of_a_fixed_name_has_a_peer():
    assert all(name in PEERS for name in model_names())
    assert libraries("vgg16") == ["torchvision", "timm"] and libraries("googlenet") == ["torchvision"]
    assert libraries("seresnet50") == libraries("resnest50d") == libraries("res2next50") == ["timm"]


def test_older_names_and_those_of_timms_vgg():
    assert new_name("features.denseblock1.denselayer2.norm.1.bias") == "features.denseblock1.denselayer2.norm1.bias"
    assert new_name("model.pre_logits.fc1.weight") == "model.classifier.0.weight"
    assert new_name("head.fc.bias") == "classifier.6.bias"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("conv1.base_layer.weight", "merge the adapters"),
        ("layer1.0.conv1.lora_A.default.weight", "merge the adapters"),
        ("conv1.weight_orig", "make the pruning permanent"),
        ("conv1.parametrizations.weight.original0", "remove the parametrization"),
        ("conv1.weight_g", "remove the parametrization"),
        ("layer1.0.conv1.weight", ""),
    ],
)
def test_weights_of_a_wrapped_network_come_with_advice(name, advice):
    found = wrapped_advice(["fc.bias", name])
    assert found.startswith(advice) and bool(found) == bool(advice)
