"""Maps torchvision's and timm's names of networks and tensors to ours.

Each of our networks has the same tensors as its peer in those libraries, under other names and with other axis orders.
A few rules convert the name of each of our parameters to the peer's; they hold for any depth and width.
"""

import re
from collections.abc import Iterable
from typing import Any

from hga_flax.errors import nearest
from hga_flax.models import res2net, resnest, vgg
from hga_flax.pretrained.cifar_weights import BLOCK, cifar_rules, is_cifar

# Peer name -> our model and attention. Plain networks have the same names in both libraries.
PEERS: dict[str, tuple[str, str]] = {
    **{
        name: (name, "none")
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "resnext50_32x4d",
            "resnext101_32x4d",
            "resnext101_32x8d",
            "resnext101_64x4d",
            "wide_resnet50_2",
            "wide_resnet101_2",
            "googlenet",
            "densenet121",
            "densenet161",
            "densenet169",
            "densenet201",
            *vgg.NETWORKS,
            *res2net.NETWORKS,
            *resnest.NETWORKS,
        )
    },
    **{
        "se" + name: (name, "se")
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "resnext50_32x4d",
            "resnext101_32x4d",
        )
    },
    "skresnext50_32x4d": ("resnext50_32x4d", "sk"),
}
# Attention options that give our network the peer's shapes, where the defaults do not.
ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {name: {"min_channels": 8} for name in ("seresnet18", "seresnet34")}
_TIMM_VGG = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Substitutions, applied in order, that convert our module path to the peer's name.
_DOWNSAMPLE = (("downsample_conv", "downsample.0"), ("downsample_norm", "downsample.1"))
_AVERAGE_DOWN = (("downsample_conv", "downsample.1"), ("downsample_norm", "downsample.2"))
_STEM_TO_HEAD = (
    ("^stem_conv", "conv1"),
    ("^stem_norm3?", "bn1"),
    ("^classifier", "fc"),
    BLOCK,
    *_DOWNSAMPLE,
)
_DEEP_STEM = (
    (r"^stem_conv(\d)", lambda match: f"conv1/{3 * int(match[1]) - 3}"),
    (r"^stem_norm([12])", lambda match: f"conv1/{3 * int(match[1]) - 2}"),
)
_RESNET = (
    *_DEEP_STEM,
    *_STEM_TO_HEAD,
    ("/norm", "/bn"),
    ("attention/squeeze", "se/fc1"),
    ("attention/excite", "se/fc2"),
)
_SKNET = (
    *_STEM_TO_HEAD,
    (r"/conv(\d)", r"/conv\1/conv"),
    (r"/norm(\d)", r"/conv\1/bn"),
    (r"attention/branch(\d+)_conv", lambda match: f"conv2/paths/{int(match[1]) - 1}/conv"),
    (r"attention/branch(\d+)_norm", lambda match: f"conv2/paths/{int(match[1]) - 1}/bn"),
    ("attention/reduce_norm", "conv2/attn/bn"),
    ("attention/reduce", "conv2/attn/fc_reduce"),
    ("attention/select", "conv2/attn/fc_select"),
)
_RES2NET = (
    (r"/conv2_(\d+)", lambda match: f"/convs/{int(match[1]) - 1}"),
    (r"/norm2_(\d+)", lambda match: f"/bns/{int(match[1]) - 1}"),
    *_RESNET,
)
_RESNEST = (
    *_AVERAGE_DOWN,
    ("split_attention/norm", "conv2/bn0"),
    ("split_attention/reduce_norm", "conv2/bn1"),
    ("split_attention/reduce", "conv2/fc1"),
    ("split_attention/select", "conv2/fc2"),
    ("split_attention", "conv2"),
    *_RESNET,
)
# Tensor names of a network that was wrapped for training, and how to undo the wrapping.
_WRAPPED = {
    r"\bbase_layer\b|\blora_": "merge the adapters (PEFT: merge_and_unload) and save the weights again",
    r"_(orig|mask)$": "make the pruning permanent (torch.nn.utils.prune.remove) and save the weights again",
    r"\bparametrizations\b|weight_[gv]$": "remove the parametrization and save the weights again",
}
_GOOGLENET = (
    ("^stem", "conv"),
    (r"branch([23])_reduce", r"branch\1/0"),
    (r"branch([23])/(conv|norm)", r"branch\1/1/\2"),
    ("branch4", "branch4/1"),
    (r"^auxiliary(\d)/hidden", r"aux\1/fc1"),
    (r"^auxiliary(\d)/classifier", r"aux\1/fc2"),
    (r"^auxiliary(\d)/reduce", r"aux\1/conv"),
    ("^classifier", "fc"),
    ("/norm", "/bn"),
)
_DENSENET = (
    (r"^stem_(conv|norm)", r"features/\g<1>0"),
    (r"^block(\d+)_layer(\d+)", r"features/denseblock\1/denselayer\2"),
    (r"^transition(\d+)_(conv|norm)", r"features/transition\1/\2"),
    ("^final_norm", "features/norm5"),
)


def _vgg(name: str) -> tuple:
    """Rules for VGG, whose layers form one list: each convolution, its norm if any, its ReLU, and the poolings."""
    sizes, step = vgg.NETWORKS[name].keywords["stage_sizes"], 3 if name.endswith("_bn") else 2

    def place(match: re.Match) -> str:
        before = sum(size * step + 1 for size in sizes[: int(match[1]) - 1])
        return f"features/{before + (int(match[3]) - 1) * step + (match[2] == 'norm')}"

    return (
        (r"^stage(\d)/(conv|norm)(\d)", place),
        ("^classifier", "classifier/6"),
        ("^hidden1", "classifier/0"),
        ("^hidden2", "classifier/3"),
    )


def _rules(name: str) -> tuple:
    if is_cifar(name):
        return cifar_rules(name)
    if name.startswith("sk"):
        return _SKNET
    if name.startswith("vgg"):
        return _vgg(name)
    if name.startswith("resnest"):
        return _RESNEST
    if name.startswith("res2ne"):
        return (*_AVERAGE_DOWN, *_RES2NET) if name.endswith("d") else _RES2NET
    if name == "googlenet":
        return _GOOGLENET
    return _DENSENET if name.startswith("densenet") else _RESNET


def peer_name(name: str | None, path: tuple[str, ...]) -> str:
    """Returns the name of our variable at `path` in the state dict of network `name`.

    An attention that the peer does not have (any but timm's SE and SK) keeps our name, after the name of its block:
    "layer1.0.attention.mfe.kernel_7". A network without a peer keeps all our names.

    Args:
        name: one of `PEERS` or `cifar_peers`, or None for a network that neither torchvision nor timm has.
        path: path in `params` or `batch_stats`, for example `("stage1_block1", "conv1", "kernel")`.
    """
    modules, leaf, ours = path[:-1], _LEAVES.get(path[-1], path[-1]), ()
    if "attention" in modules and attention_of(name) == "none":
        at = modules.index("attention")
        modules, ours = modules[:at], modules[at:]
    module = "/".join(modules)
    for pattern, replacement in _rules(name) if name else ():
        module = re.sub(pattern, replacement, module)
    return ".".join([*filter(None, module.split("/")), *ours, leaf])


def attention_of(name: str | None) -> str:
    """Returns the attention of a peer: "none" for plain networks, CIFAR networks and None."""
    return PEERS[name][1] if name in PEERS else "none"


def peers_of(model: str) -> list[str]:
    """Returns the names in `PEERS` that correspond to our network `model`."""
    return [name for name, (ours, _) in PEERS.items() if ours == model]


def no_peer(model: str) -> str:
    """Returns an error message saying that neither library has our network `model`."""
    ours = dict.fromkeys(ours for ours, _ in PEERS.values())
    return f"neither torchvision nor timm has a '{model}'{nearest(model, ours)}; they have: {', '.join(ours)}"


def export_peer(model: str, attention: str) -> str | None:
    """Returns the name in `PEERS` whose tensor names an export uses; None if neither library has the network.

    It is the network with this attention if there is one, otherwise the plain network.
    """
    peers = {PEERS[name][1]: name for name in peers_of(model)}
    return peers.get(attention, peers.get("none"))


def libraries(name: str) -> list[str]:
    """Returns which of torchvision and timm provide a network of `PEERS`."""
    if name == "googlenet":
        return ["torchvision"]
    return ["timm"] if re.match("se|sk|res2ne|resnest|resnext101_32x4d", name) else ["torchvision", "timm"]


def wrapped_advice(names: Iterable[str]) -> str:
    """Returns how to undo the wrapping if the names are those of a wrapped network (see `_WRAPPED`), otherwise ""."""
    for pattern, advice in _WRAPPED.items():
        if any(re.search(pattern, name) for name in names):
            return advice
    return ""


def new_name(name: str) -> str:
    """Converts old names of DenseNet's layers to current ones, and timm's names of VGG's head to torchvision's."""
    for there, here in _TIMM_VGG.items():
        name = re.sub(rf"(^|\.){there}\.(weight|bias)$", rf"\1{here}.\2", name)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", name)
