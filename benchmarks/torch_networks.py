"""PyTorch networks to compare with ours: timm's if it is installed, and plain ones with HGA in idiomatic PyTorch."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

from hga_flax.bench.step import CLASSES, Contender
from hga_flax.errors import UserError, one_line

if importlib.util.find_spec("torch") is None:
    raise UserError("bench step --vs-torch: PyTorch is not installed; pip install torch timm")

import torch
from torch import nn
from torch.nn import functional

try:
    import timm
except (ImportError, RuntimeError) as error:  # timm imports torchvision, which fails if it was built for another torch
    timm, missing = None, f"timm cannot be imported ({one_line(error)}; pip install timm torchvision)"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4  # as in configs/base.py
TIMM = {"resnet50": "none", "seresnet50": "se", "resnext50_32x4d": "none", "seresnext50_32x4d": "se"}
PLAIN = (("resnet50", "none"), ("resnet50", "se"), ("resnet50", "hga"))


class SqueezeExcitation(nn.Module):
    """SE with ratio 16 and biases."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, channels // 16, 1), nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.excite(e))


class HierarchicalGlobalAttention(nn.Module):
    """HGA as in the paper's equations: four depthwise convolutions, adaptive poolings, a shared FC."""

    def __init__(self, channels: int, reduced: int = 32):
        super().__init__()
        hidden = reduced // 4
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        self.scales = nn.ModuleList(
            nn.Conv2d(reduced, reduced, k, padding=k // 2, groups=reduced, bias=False) for k in (1, 3, 5, 7)
        )
        self.suppress = nn.Linear(21 * reduced, hidden, bias=False)
        self.excite = nn.Linear(hidden, reduced, bias=False)
        self.restore = nn.Linear(reduced, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.reduce(x)
        e = 0
        for scale in self.scales:
            y = scale(z)
            cells = [functional.adaptive_avg_pool2d(y, bins).flatten(2) for bins in (1, 2, 4)]
            # Cells first, as in our parameters: [B, 21, C].
            e = e + self.suppress(torch.cat(cells, dim=2).transpose(1, 2).flatten(1))
        e = self.restore(self.excite(functional.relu(e)))
        return x * torch.sigmoid(e)[:, :, None, None]


ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "se": SqueezeExcitation,
    "hga": HierarchicalGlobalAttention,
}


class Bottleneck(nn.Module):
    """ResNet's bottleneck (v1.5) with an attention before the addition."""

    def __init__(self, channels: int, features: int, stride: int, attention: str):
        super().__init__()
        out = 4 * features
        self.conv1, self.norm1 = nn.Conv2d(channels, features, 1, bias=False), nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.conv3, self.norm3 = nn.Conv2d(features, out, 1, bias=False), nn.BatchNorm2d(out)
        self.attention = ATTENTIONS[attention](out)
        self.downsample = None
        if channels != out or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        y = self.attention(self.norm3(self.conv3(y)))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet with an attention, by default ResNet-50: `[B, 3, H, W]` -> logits."""

    def __init__(self, attention: str, stage_sizes: tuple[int, ...] = (3, 4, 6, 3)):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, channels = [], 64
        for stage, count in enumerate(stage_sizes):
            for block in range(count):
                features = 64 * 2**stage
                blocks.append(Bottleneck(channels, features, 2 if stage and not block else 1, attention))
                channels = 4 * features
        self.blocks, self.classifier = nn.Sequential(*blocks), nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def check(models: Sequence[str]) -> None:
    """Raises UserError if none of the networks has a PyTorch counterpart."""
    present = sorted({name for name, _ in PLAIN} | (set() if timm is None else {n.removeprefix("se") for n in TIMM}))
    if not set(models) & set(present):
        raise UserError(f"--vs-torch: only {', '.join(present)} have PyTorch counterparts; name one in --models")


def contenders(
    models: Sequence[str], batch: int, image_size: int, dtype: str, log: Callable[[str], None]
) -> list[Contender]:
    """Returns the PyTorch counterparts of networks, ready to train, on a GPU if PyTorch sees one.

    They use channels_last, autocast for bfloat16, and torch.compile on a GPU.

    Args:
        models: names of our networks; only resnet50 and resnext50_32x4d have counterparts here.
        batch: images per step.
        image_size: height and width in pixels.
        dtype: type of the computation.
        log: called with lines about progress and missing packages.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, also JAX's default on GPUs
    found = []
    if timm is None:
        log(f"{missing}; plain PyTorch networks stand in for its resnet50 and seresnet50")
        found += [("torch " + n, attention, lambda a=attention: ResNet(a)) for n, attention in PLAIN if n in models]
    else:
        found += [
            ("timm " + name, attention, lambda n=name: timm.create_model(n, num_classes=CLASSES))
            for name, attention in TIMM.items()
            if name.removeprefix("se") in models
        ]
        if "resnet50" in models:
            found.append(("torch resnet50", "hga", lambda: ResNet("hga")))
    ready = []
    for name, attention, make in found:
        log(f"preparing {name} with {attention} ...")
        ready.append(contender(name, attention, make().to(device, memory_format=torch.channels_last), batch,
                               image_size, dtype))  # fmt: skip
        log(f"compiled {name} with {attention} in {ready[-1].compile_s:.0f} s")
    return ready


def contender(name: str, attention: str, network: nn.Module, batch: int, image_size: int, dtype: str) -> Contender:
    """Returns a PyTorch network as a contender that has already compiled in its first step."""
    device = next(network.parameters()).device
    on_gpu = device.type == "cuda"
    params = sum(p.numel() for p in network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    images = torch.randint(0, 256, (batch, 3, image_size, image_size), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
    network.train()

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = network((images.float() / 255 - mean) / std)
        return functional.cross_entropy(logits.float(), labels)

    compiled: Any = torch.compile(loss_of) if on_gpu else loss_of

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            compiled(images).backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    run(1)
    compile_s = max(0.0, first - (time.perf_counter() - start))
    memory = None
    if on_gpu:
        optimizer.zero_grad()  # else the last step's gradients would count as there before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(1)
        # Without the memory of the other networks on the device: parameters, momentum and batch are this network's.
        own = 2 * sum(p.numel() * p.element_size() for p in network.parameters())
        own += sum(array.numel() * array.element_size() for array in (images, labels))
        memory = torch.cuda.max_memory_allocated() - before + own
    return Contender(name, attention, params, compile_s, run, peak_memory_bytes=memory)
