"""Converts weights of torchvision's and timm's networks to this project's variables and back.

`torch_names.py` maps the names, this file the axes. The error for a wrong file lists the tensors that are missing,
unexpected or of another shape. Writing and reading again is bit-exact. Released weights:
https://docs.pytorch.org/vision/stable/models.html, https://huggingface.co/timm.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hga_flax.errors import UserError, nearest
from hga_flax.models import vgg
from hga_flax.models.registry import create_model
from hga_flax.pretrained.cifar_weights import BOTH_SIDES, cifar_peers, our_order
from hga_flax.pretrained.file_kinds import listed
from hga_flax.pretrained.torch_contents import Choice, Contents
from hga_flax.pretrained.torch_names import ATTENTION_OPTIONS, PEERS, attention_of, new_name, peer_name, peers_of

# Height and width of the map that a layer reads flattened, channels first in PyTorch: auxiliary heads, VGG's first FC.
_FLATTENED = {"hidden": 4, "hidden1": vgg.POOLED}


class Found(NamedTuple):
    """A network's tensors in a file.

    Attributes:
        peer: entry of `PEERS` or `cifar_peers` whose names the tensors have, or None for our names, see `peer_name`.
        choice: the tensors that were chosen.
        size: number of tensors of the network.
    """

    peer: str | None
    choice: Choice
    size: int


def find_peer(model: str, contents: Contents, places: Mapping[tuple[str, ...], Any], wanted: str = "") -> Found:
    """Finds a network's tensors in a file, under any wrappers and prefixes.

    Args:
        model: name of our network.
        contents: contents of the file.
        places: our variables, or their shapes, by paths such as `("params", "stage1_block1", "conv1", "kernel")`.
        wanted: see `Contents.choose`.

    Raises:
        ValueError: no tensor of the network is under `wanted`.
    """
    marks = {"se": ".se.", "sk": ".paths."}  # occur in the names of a network with that attention
    names = [leaf.name for leaf in contents.leaves]
    attention = next((a for a, mark in marks.items() if any(mark in name for name in names)), "none")
    found, missing = [], []
    peers = sorted(peers_of(model), key=lambda name: attention_of(name) != attention)
    for peer in peers or [*cifar_peers(model), None]:
        shapes = {peer_name(peer, path[1:]): _torch_shape(path, place.shape) for path, place in places.items()}
        try:
            found.append(Found(peer, contents.choose(shapes, new_name, wanted), len(shapes)))
        except ValueError as error:  # no tensor under `wanted` has a name of this library
            missing.append(error)
    if not found:
        raise missing[0]
    return max(found, key=lambda found: found.choice.score)  # the first one on a tie


def renamed(
    name: str | None, tensors: Mapping[str, np.ndarray], paths: Iterable[tuple[str, ...]]
) -> tuple[dict[tuple[str, ...], np.ndarray], list[str]]:
    """Converts a state dict to our names and axes without checking shapes.

    Args:
        name: peer whose names the tensors have, see `peer_name`.
        tensors: arrays by name, for example from `read_torch_file`.
        paths: paths of our variables, such as `("params", "stage1_block1", "conv1", "kernel")`.

    Returns:
        The arrays by path, with our axes, and the names of tensors that match no path.
    """
    given, arrays = _plain_names(tensors), {}
    for path in paths:
        key = peer_name(name, path[1:])
        if key in given:
            arrays[path] = _converted(path, _squeezed(name, path, given.pop(key)))
    if name is not None and name.startswith(BOTH_SIDES) and not any("downsample_conv" in path for path in arrays):
        arrays = our_order(arrays)
    return arrays, list(given)


def _plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors under their names by `new_name`, without BatchNorm's counters, which we do not have."""
    named = {new_name(key): value for key, value in tensors.items()}
    return {key: value for key, value in named.items() if not key.endswith("num_batches_tracked")}


def _squeezed(name: str | None, path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """Flattens kernels of whole-map convolutions, which timm's SE, SK and VGG have in place of our FC layers."""
    dense = _head(path) in ("hidden1", "hidden2", "classifier") or (
        _is_timms(name, path) and tensor.shape[2:] == (1, 1)
    )
    return tensor.reshape(len(tensor), -1) if dense and tensor.ndim == 4 else tensor


def _head(path: tuple[str, ...]) -> str:
    """Returns the name of the layer of a variable; "" within an attention, whose author may call a layer "hidden"."""
    return "" if "attention" in path else path[-2]


def _is_timms(name: str | None, path: tuple[str, ...]) -> bool:
    """Returns whether the variable belongs to an attention that the peer `name` has too (SE or SK)."""
    return "attention" in path and attention_of(name) != "none"


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the peer's shape for our variable: OIHW for convolutions, out x in for fully connected layers."""
    if not _has_torch_axes(path, len(shape)):
        return shape
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _has_torch_axes(path: tuple[str, ...], rank: int) -> bool:
    """Returns whether PyTorch has another axis order for our variable; HGA's kernels are `kernel_1`, `kernel_3`, ..."""
    return path[-1].startswith("kernel") and rank in (2, 4)


def _converted(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    """Converts a peer's tensor to our axis order."""
    if not _has_torch_axes(path, tensor.ndim):
        return tensor
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    (outputs, inputs), size = tensor.shape, _FLATTENED.get(_head(path), 1)
    if inputs % size**2:
        return tensor.T  # of another shape; the caller reports it
    return tensor.reshape(outputs, inputs // size**2, size, size).transpose(2, 3, 1, 0).reshape(inputs, outputs)


def torch_tensors(name: str | None, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts variables to a state dict, the bit-exact inverse of `variables_from_torch`.

    Args:
        name: peer whose names the state dict gets, see `peer_name`.
        variables: `{"params": ..., "batch_stats": ...}` of a network with the peer's layers and any attention.

    Raises:
        UserError: two variables get one name.
    """
    tensors: dict[str, np.ndarray] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for path, array in flatten_dict(dict(variables)).items():
        key = peer_name(name, path[1:])
        if paths.setdefault(key, path) != path:
            both = " and ".join("/".join(p[1:]) for p in (paths[key], path))
            raise UserError(f"{both} would both be called {key} in the file; give them other names")
        tensors[key] = _as_torch(name, path, np.asarray(array))
    return tensors


def _as_torch(name: str | None, path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Converts our variable to PyTorch's axis order, the inverse of `_converted`."""
    if not _has_torch_axes(path, array.ndim):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if _head(path) in _FLATTENED:
        size = _FLATTENED[_head(path)]
        return array.reshape(size, size, -1, array.shape[-1]).transpose(3, 2, 0, 1).reshape(array.shape[::-1])
    return array.T[:, :, None, None] if _is_timms(name, path) else array.T  # see `_squeezed`


def torch_model(name: str, tensors: Mapping[str, np.ndarray], **options: Any) -> nn.Module:
    """Creates our model for a peer's state dict, which determines the number of classes and the auxiliary heads.

    Args:
        name: one of `PEERS`: a torchvision or timm name.
        tensors: the state dict.
        **options: further options of `create_model`, for example `dtype`.

    Raises:
        ValueError: the network or an option is unknown.
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


def variables_from_torch(
    name: str, tensors: Mapping[str, np.ndarray], model: nn.Module | None = None, dtype: Any = jnp.float32
) -> dict:
    """Converts a torchvision or timm state dict to `{"params": ..., "batch_stats": ...}`.

    Args:
        name: one of `PEERS`: the network of the state dict.
        tensors: arrays by name, for example from `read_torch_file`. `num_batches_tracked` is ignored.
        model: our network; None creates it by `torch_model`.
        dtype: dtype of the variables.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message lists them.
        ValueError: the network is unknown.
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
        text = "; ".join(f"{len(names)} {kind}: {listed(names, 8)}" for kind, names in problems if names)
        raise UserError(f"these are not the weights of {name}: {text}")
    return unflatten_dict(converted)
