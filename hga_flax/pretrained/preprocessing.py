"""Preprocessing used with released weights: size, crop, interpolation, mean and standard deviation.

A weights file does not say how its images were preprocessed, but its name shows it. Sources: torchvision's `transforms`
of each weight (https://docs.pytorch.org/vision/stable/models.html), timm's pretrained configurations (`test_crop_pct`,
`interpolation`, ...; https://huggingface.co/timm), and the programs named in cifar_weights.py.
"""

import dataclasses
import pathlib
import re

from hga_flax.pretrained.cifar_weights import BOTH_SIDES, is_cifar
from hga_flax.pretrained.torch_names import libraries

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the images for a network.

    Attributes:
        known: source of this information.
        image_size: height and width of the network's input in pixels.
        crop_fraction: fraction of the short side that the centre crop keeps; 0 resizes the whole image.
        interpolation: interpolation with which the weights were evaluated.
        mean: mean per channel, for values in 0..1.
        std: standard deviation per channel, for values in 0..1.
    """

    known: str
    image_size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


# What GoogLeNet's option `transform_input` makes of images with ImageNet's mean and std.
TRANSFORM_INPUT = Preprocessing("torchvision, transform_input", mean=(0.5,) * 3, std=(0.5,) * 3)
# The first pattern found in a file's name decides; files are named by torchvision, timm or the Hugging Face cache.
_TV2 = "11ad3fa6|cd907fc2|f82ba261|1a0047aa|110c445d|173b62eb|9ba9bcbe|d733dc28|[._]tv2_in1k"
_NAMED = (
    (_TV2, Preprocessing("torchvision, the second version of these weights", 224, 224 / 232)),
    (r"ra4_e3600", Preprocessing("timm", 224, 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)),
    (r"resnet50[._]a1h(2_\d+)?(-|_in1k)|[._]bamboo", Preprocessing("timm", 224, 1.0, "bicubic")),
    (r"[._](a1|a2|a3|a1h|b1k|b2k|c|c1|c2|d)(h?2?_\d+)?(-|_in1k)", Preprocessing("timm", 224, 0.95, "bicubic")),
    (r"1378be20", TRANSFORM_INPUT),
    (r"[._](ra|ra2|ram|racm|am|bt|gluon)(_224)?(-|_in1k)|gluon_|rw_resnet50|resnet34-43635321",
     Preprocessing("timm", 224, 0.875, "bicubic")),
)  # fmt: skip
# Networks whose weights have no other size or crop in their name.
_OF_PEER = {
    "resnest50d_1s4x24d": Preprocessing("timm", interpolation="bicubic"),
    "resnest50d_4s2x40d": Preprocessing("timm", interpolation="bicubic"),
    "resnest101e": Preprocessing("timm", 256, 0.875),
    "resnest200e": Preprocessing("timm", 320, 0.909, "bicubic"),
    "resnest269e": Preprocessing("timm", 416, 0.928, "bicubic"),
}


# The values of this program's own training logs, by the start of its files' names.
_CIFAR_MODELS = {
    "cifar10_": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100_": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


def preprocessing_of(peer: str, path: str) -> Preprocessing | None:
    """Returns the preprocessing for a weights file; None if its name does not show it.

    Args:
        peer: name of the network in the file, see `torch_names.py`.
        path: path of the file; its name, or that of its folder in the Hugging Face cache, distinguishes different
            weights of one network.
    """
    *folders, file = pathlib.PurePath(path).parts
    if peer.startswith(BOTH_SIDES):
        return Preprocessing("pytorch_resnet_cifar10", 32, 0, "none")
    if is_cifar(peer):  # other programs give their arrays the same names
        values = next((values for start, values in _CIFAR_MODELS.items() if file.startswith(start)), None)
        return Preprocessing("pytorch-cifar-models", 32, 0, "none", *values) if values else None
    if file in ("model.safetensors", "pytorch_model.bin"):  # the Hugging Face Hub names the folder
        file = next((folder for folder in reversed(folders) if folder.startswith("models--")), "".join(folders[-1:]))
    for pattern, known in _NAMED:
        if re.search(pattern, file):
            return known
    return _OF_PEER.get(peer, Preprocessing(libraries(peer)[0]))
