"""Weights of torchvision's and timm's networks as this project's variables.

A network here and its peer there have the same tensors under other names and axes. Each of our
parameters is given the peer's name by a few rules, so that a wrong file is refused with the names
that are missing, unexpected or of another shape. Released weights:
https://docs.pytorch.org/vision/stable/models.html, https://huggingface.co/timm.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hga_flax.errors import UserError, nearest
from hga_flax.models import res2net, resnest, vgg
from hga_flax.models.registry import create_model
from hga_flax.models.torch_contents import Choice, Contents

# The peers' names -> our model and attention. Plain networks have the same names in both libraries.
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
# Options of the attention with which our network has the peer's shapes, where the defaults give others.
ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {name: {"min_channels": 8} for name in ("seresnet18", "seresnet34")}
# Rows and columns of the map, channels first there, that a layer reads flattened: an auxiliary head's and VGG's first.
_FLATTENED = {"hidden": 4, "hidden1": vgg.POOLED}
_TIMM_VGG = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Substitutions, in order, that turn a module's path here into the peer's name.
_BLOCK = (r"^stage(\d+)_block(\d+)", lambda match: f"layer{match[1]}.{int(match[2]) - 1}")
_DOWNSAMPLE = (("downsample_conv", "downsample.0"), ("downsample_norm", "downsample.1"))
_AVERAGE_DOWN = (("downsample_conv", "downsample.1"), ("downsample_norm", "downsample.2"))
_DEEP_STEM = (
    (r"^stem_conv(\d)", lambda match: f"conv1/{3 * int(match[1]) - 3}"),
    (r"^stem_norm([12])", lambda match: f"conv1/{3 * int(match[1]) - 2}"),
)
_RESNET = (
    *_DEEP_STEM,
    ("^stem_conv", "conv1"),
    ("^stem_norm3?", "bn1"),
    ("^classifier", "fc"),
    _BLOCK,
    *_DOWNSAMPLE,
    ("/norm", "/bn"),
    ("attention/squeeze", "se/fc1"),
    ("attention/excite", "se/fc2"),
)
_SKNET = (
    ("^stem_conv", "conv1"),
    ("^stem_norm", "bn1"),
    ("^classifier", "fc"),
    _BLOCK,
    *_DOWNSAMPLE,
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
    """VGG's layers lie in one list: each convolution, the norm behind it if there is one, ReLU, and the poolings."""
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
    if name.startswith("sk"):
        return _SKNET
    if name.startswith("vgg"):
        return _vgg(name)
    if name.startswith("resnest"):
        return _RESNEST
    if name.startswith("res2ne"):
        return (*_AVERAGE_DOWN, *_RES2NET) if name.endswith("d") else _RES2NET
    return {"googlenet": _GOOGLENET}.get(name, _DENSENET if name.startswith("densenet") else _RESNET)


def peer_name(name: str, path: tuple[str, ...]) -> str:
    """Returns the name that network `name`'s state dict gives to our variable at `path`.

    Args:
        name: one of `PEERS`.
        path: path in `params` or `batch_stats`, for example `("stage1_block1", "conv1", "kernel")`.
    """
    module = "/".join(path[:-1])
    for pattern, replacement in _rules(name):
        module = re.sub(pattern, replacement, module)
    return f"{module.replace('/', '.')}.{_LEAVES[path[-1]]}"


class Found(NamedTuple):
    """A network's tensors in a file.

    Attributes:
        peer: the one of `PEERS` whose names they have.
        choice: which they are.
        size: how many tensors the network has.
    """

    peer: str
    choice: Choice
    size: int


def peers_of(model: str) -> list[str]:
    """Returns those of `PEERS` that have our network `model`.

    Raises:
        ValueError: neither torchvision nor timm has this network.
    """
    peers = [name for name, (ours, _) in PEERS.items() if ours == model]
    if not peers:
        ours = dict.fromkeys(ours for ours, _ in PEERS.values())
        raise ValueError(
            f"neither torchvision nor timm has a '{model}'{nearest(model, ours)}; they have: {', '.join(ours)}"
        )
    return peers


def find_peer(model: str, contents: Contents, places: Mapping[tuple[str, ...], Any], wanted: str = "") -> Found:
    """Finds a network's tensors in a file, under whatever wrappers and prefixes.

    Args:
        model: our network.
        contents: of the file.
        places: our variables, or their shapes, by paths such as `("params", "stage1_block1", "conv1", "kernel")`.
        wanted: see `Contents.choose`.

    Raises:
        ValueError: neither torchvision nor timm has this network, or nothing of it stands under `wanted`.
    """
    peers = peers_of(model)
    marks = {"se": ".se.", "sk": ".paths."}  # in the names of a network with that attention
    names = [leaf.name for leaf in contents.leaves]
    attention = next((a for a, mark in marks.items() if any(mark in name for name in names)), "none")
    peers.sort(key=lambda name: PEERS[name][1] != attention)
    found = []
    for peer in peers:
        shapes = {
            peer_name(peer, path[1:]): _torch_shape(path, place.shape)
            for path, place in places.items()
            if path[-1] in _LEAVES
        }
        found.append(Found(peer, contents.choose(shapes, _new_name, wanted), len(shapes)))
    return max(found, key=lambda found: found.choice.score)  # the first of equals


def renamed(
    name: str, tensors: Mapping[str, np.ndarray], paths: Iterable[tuple[str, ...]]
) -> tuple[dict[tuple[str, ...], np.ndarray], list[str]]:
    """Brings a state dict under our names, without asking for its shapes.

    Args:
        name: one of `PEERS`: the network that the state dict belongs to.
        tensors: arrays by name, for example from `read_torch_file`.
        paths: of our variables, `("params", "stage1_block1", "conv1", "kernel")`.

    Returns:
        The arrays that have one of these places, with our axes, and the names of those that have none.
    """
    given, arrays = _plain_names(tensors), {}
    for path in paths:
        key = peer_name(name, path[1:]) if path[-1] in _LEAVES else None
        if key in given:
            arrays[path] = _converted(path, _squeezed(path, given.pop(key)))
    return arrays, list(given)


def _plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors that we have a place for, under the names of `_new_name`."""
    named = {_new_name(key): value for key, value in tensors.items()}
    return {key: value for key, value in named.items() if not key.endswith("num_batches_tracked")}


def _new_name(name: str) -> str:
    """Returns the name that DenseNet's layers have today, and torchvision's of the head of timm's VGG."""
    for there, here in _TIMM_VGG.items():
        name = re.sub(rf"(^|\.){there}\.(weight|bias)$", rf"\1{here}.\2", name)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", name)


def _squeezed(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """timm's SE, SK and VGG have convolutions of a whole map where we have fully connected layers."""
    dense = path[-2] in ("hidden1", "hidden2", "classifier") or ("attention" in path and tensor.shape[2:] == (1, 1))
    return tensor.reshape(len(tensor), -1) if dense and tensor.ndim == 4 else tensor


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the peer's shape of our variable: OIHW convolutions, out x in for fully connected layers."""
    if path[-1] != "kernel":
        return shape
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _converted(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """Returns a peer's tensor with our axes."""
    if path[-1] != "kernel":
        return tensor
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    if path[-2] in _FLATTENED:
        outputs, size = tensor.shape[0], _FLATTENED[path[-2]]
        return tensor.reshape(outputs, -1, size, size).transpose(2, 3, 1, 0).reshape(-1, outputs)
    return tensor.T


def torch_model(name: str, tensors: Mapping[str, np.ndarray], **options: Any) -> nn.Module:
    """Creates our model for a peer's state dict; the number of classes and auxiliary heads come from it.

    Args:
        name: one of `PEERS`: a torchvision or timm name.
        tensors: the state dict.
        **options: further options of `create_model`, for example `dtype`.

    Raises:
        ValueError: an unknown network or option.
    """
    if name not in PEERS:
        raise ValueError(f"no PyTorch weights for '{name}'{nearest(name, PEERS)}; known: {', '.join(PEERS)}")
    model, attention = PEERS[name]
    bias = tensors.get(peer_name(name, ("classifier", "bias")))
    if bias is not None and bias.ndim == 1:
        options = {"num_classes": bias.shape[0], **options}
    if name == "googlenet" and any(key.startswith("aux") for key in tensors):
        options = {"aux_logits": True, **options}
    return create_model(model, attention=attention, attention_options=ATTENTION_OPTIONS.get(name), **options)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def variables_from_torch(
    name: str, tensors: Mapping[str, np.ndarray], model: nn.Module | None = None, dtype: Any = jnp.float32
) -> dict:
    """Turns a torchvision or timm state dict into `{"params": ..., "batch_stats": ...}`.

    Args:
        name: one of `PEERS`: the network that the state dict belongs to.
        tensors: arrays by name, for example from `read_torch_file`. `num_batches_tracked` is ignored.
        model: our network, from `torch_model` unless given.
        dtype: of the variables.

    Raises:
        UserError: names are missing, unexpected or of another shape; the message lists them.
        ValueError: an unknown network.
    """
    given = _plain_names(tensors)
    model = torch_model(name, given) if model is None else model
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    missing, misshapen, converted = [], [], {}
    for path, variable in flatten_dict(dict(variables)).items():
        key = peer_name(name, path[1:])
        if key not in given:
            missing.append(key)
            continue
        tensor, expected = given.pop(key), _torch_shape(path, variable.shape)
        if len(expected) == 2 and tensor.ndim == 4:  # see `_squeezed`
            tensor = tensor.reshape(len(tensor), -1)
        if tensor.shape != expected:
            misshapen.append(f"{key} {list(tensor.shape)} instead of {list(expected)}")
            continue
        converted[path] = jnp.asarray(_converted(path, tensor), dtype)
    problems = (("missing", missing), ("unexpected", list(given)), ("of another shape", misshapen))
    if missing or given or misshapen:
        listed = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems if names)
        raise UserError(f"these are not the weights of {name}: {listed}")
    return unflatten_dict(converted)
