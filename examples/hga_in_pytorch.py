"""Uses HGA in PyTorch, with the weights of a network trained with hga_flax.

    python -m hga_flax export --workdir=RUN --format=safetensors --out=network.safetensors
    python -m examples.hga_in_pytorch network.safetensors [images.npy]

builds timm's network, adds an HGA after the last norm of every block, loads the file, and prints the classes of
normalised images, float32 `[B, C, H, W]`, or of noise. It needs torch, timm and safetensors, but not hga_flax:
copy `HGA` and `add_hga` into your own program. torchvision's networks of the same names work, too.
"""

import argparse
import json

import numpy as np
import torch
from safetensors import safe_open
from torch import nn


class HGA(nn.Module):
    """`[B, channels, H, W]` -> the same shape. Options and parameter names are those of hga_flax and its files."""

    def __init__(self, channels, reduced_channels=32, kernels=(1, 3, 5, 7), bins=(1, 2, 4), group_size=1, **start):
        super().__init__()
        self.narrow = reduced_channels is not None and channels > reduced_channels
        width = reduced_channels if self.narrow else channels
        self.bins, self.groups, hidden = bins, width // group_size, max(1, width // 4)
        parameter = lambda *shape: nn.Parameter(torch.randn(shape) / shape[-2] ** 0.5)
        self.mfe, self.ee = nn.Module(), nn.Module()
        for k in kernels:
            self.mfe.register_parameter(f"kernel_{k}", parameter(width, group_size, k, k))
        self.ee.suppress, self.ee.excite = parameter(sum(n * n for n in bins), width, hidden), parameter(hidden, width)
        if self.narrow:
            self.reduce, self.restore = nn.Linear(channels, width, bias=False), nn.Linear(width, channels, bias=False)
        self.identity_start_share = nn.Parameter(torch.zeros(channels)) if start.pop("identity_start", False) else None
        assert not start, f"this example lacks the options {start}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = nn.functional.conv2d(x, self.reduce.weight[:, :, None, None]) if self.narrow else x
        e = 0
        for kernel in self.mfe.parameters():
            scale = nn.functional.conv2d(z, kernel, padding=kernel.shape[-1] // 2, groups=self.groups)
            cells = torch.cat([nn.functional.adaptive_avg_pool2d(scale, n).flatten(2) for n in self.bins], dim=2)
            e = e + torch.einsum("bcn,nch->bh", cells, self.ee.suppress)
        e = nn.functional.relu(e) @ self.ee.excite
        gate = torch.sigmoid(self.restore(e) if self.narrow else e)
        if self.identity_start_share is not None:
            gate = 1 + self.identity_start_share * (gate - 1)
        return x * gate[:, :, None, None]


def add_hga(network: nn.Module, **options) -> nn.Module:
    """Adds an HGA named `attention` to every block of a ResNet, ResNeXt, Res2Net or ResNeSt, after its last norm."""
    for block in [module for module in network.modules() if hasattr(module, "bn2") or hasattr(module, "bn3")]:
        norm = getattr(block, "bn3", None) or block.bn2
        block.attention = HGA(norm.num_features, **options)
        norm.register_forward_hook(lambda module, inputs, y, block=block: block.attention(y))
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="file written by `python -m hga_flax export --format=safetensors`")
    parser.add_argument("images", nargs="?", help=".npy file of normalised images, float32 [B, C, H, W]")
    arguments = parser.parse_args()
    import timm

    with safe_open(arguments.file, "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    classes, colours = facts["class_names"], facts["preprocessing"]["channels"]
    channels = {"RGB": 3, "grey": 1}.get(colours, colours)
    network = timm.create_model(facts["names"]["network"], num_classes=len(classes), in_chans=channels)
    add_hga(network, **facts["attention_options"]).load_state_dict(tensors)
    images = np.load(arguments.images) if arguments.images else np.random.randn(2, channels, 224, 224)
    print([classes[i] for i in network.eval()(torch.as_tensor(images, dtype=torch.float32)).argmax(1)])


if __name__ == "__main__":
    main()
