"""PyTorch loads what `export --format=safetensors` writes, and computes the same logits."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch safetensors")
pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install safetensors")
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from examples import hga_in_pytorch  # noqa: E402
from hga_flax.inference.to_safetensors import to_safetensors  # noqa: E402
from hga_flax.models import create_model  # noqa: E402
from hga_flax.pretrained.torch_names import export_peer  # noqa: E402
from hga_flax.pretrained.torch_weights import torch_tensors  # noqa: E402
from tests.reference import perturbed  # noqa: E402

SIZE = 70


class Block(nn.Module):
    """A residual block as torchvision has it: 3x3, 3x3, or 1x1, 3x3, 1x1."""

    def __init__(self, inputs, widths, stride):
        super().__init__()
        kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
        self.layers, channels = len(widths), inputs
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True), start=1):
            step = stride if i == kernels.index(3) + 1 else 1
            setattr(self, f"conv{i}", nn.Conv2d(channels, width, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(width))
            channels = width
        if inputs != channels or stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = x
        for i in range(1, self.layers + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = functional.relu(y) if i < self.layers else y
        return functional.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """Two stages of one block each, under torchvision's names."""

    def __init__(self, features, expansion, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, features, 7, 2, 3, bias=False), nn.BatchNorm2d(features)
        widths = lambda n: (n, n) if expansion == 1 else (n, n, expansion * n)
        self.layer1 = nn.Sequential(Block(features, widths(features), 1))
        self.layer2 = nn.Sequential(Block(features * expansion, widths(2 * features), 2))
        self.fc = nn.Linear(2 * features * expansion, classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def written(file, name, attention="none", **options):
    """Writes a network with random weights and statistics; returns images and its logits for them."""
    model = create_model(name, attention=attention, num_classes=5, **options)
    images = np.random.RandomState(0).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    fan_in = lambda leaf: np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
    noise = perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    variables = jax.tree.map(lambda leaf: np.asarray(leaf / 0.3 * fan_in(leaf), np.float32), noise)
    peer = export_peer(name, attention)
    facts = {
        "names": {"network": peer},
        "class_names": ["a", "b", "c", "d", "e"],
        "preprocessing": {"channels": "RGB"},
        "attention_options": {},
    }
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()}
    file.write_bytes(to_safetensors(torch_tensors(peer, variables), metadata))
    return images.transpose(0, 3, 1, 2).copy(), np.asarray(jax.jit(model.apply)(variables, images))


def check(network, file, images, logits):
    network.load_state_dict(load_file(file))  # strict: every name, every shape, and none besides
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(images)).numpy()
    assert abs(found - logits).max() < 1e-4 * abs(logits).max()


def imported_timm():
    try:
        import timm
    except ImportError as error:  # timm is not installed, or what it needs is not
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


@pytest.mark.parametrize(
    ("name", "features", "expansion", "attention"),
    [("resnet18", 16, 1, "none"), ("resnet18", 16, 1, "hga"), ("resnet50", 16, 4, "hga")],
)
def test_a_plain_pytorch_network_gives_the_same_logits(tmp_path, name, features, expansion, attention):
    """HGA with and without reduction: the blocks have 16 to 128 channels."""
    file = tmp_path / "network.safetensors"
    images, logits = written(file, name, attention, features=features, stage_sizes=(1, 1))
    network = ResNet(features, expansion, 5)
    check(hga_in_pytorch.add_hga(network) if attention == "hga" else network, file, images, logits)


def test_hgas_options_are_those_of_the_constructor(tmp_path):
    file, options = tmp_path / "network.safetensors", {"kernels": (3, 5), "bins": (1, 3), "group_size": 2}
    options |= {"reduced_channels": 8, "identity_start": True}
    images, logits = written(file, "resnet50", "hga", features=16, stage_sizes=(1, 1), attention_options=options)
    check(hga_in_pytorch.add_hga(ResNet(16, 4, 5), **options), file, images, logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *[("resnet18", "none"), ("resnet18", "hga"), ("resnext50_32x4d", "sk"), ("resnext50_32x4d", "se")],
        *[("densenet121", "none"), ("res2net50_26w_4s", "hga"), ("resnest14d", "hga")],
    ],
)
def test_timms_network_gives_the_same_logits(tmp_path, name, attention):
    timm, file = imported_timm(), tmp_path / "network.safetensors"
    images, logits = written(file, name, attention)
    network = timm.create_model(export_peer(name, attention), num_classes=5)
    check(hga_in_pytorch.add_hga(network) if attention == "hga" else network, file, images, logits)


@pytest.mark.slow
def test_the_example_prints_the_classes(tmp_path, monkeypatch, capsys):
    imported_timm()
    file = tmp_path / "network.safetensors"
    images, logits = written(file, "resnet18", "hga")
    np.save(tmp_path / "images.npy", images)
    monkeypatch.setattr("sys.argv", ["hga_in_pytorch", str(file), str(tmp_path / "images.npy")])
    hga_in_pytorch.main()
    assert capsys.readouterr().out.strip() == str(["abcde"[i] for i in logits.argmax(axis=1)])
