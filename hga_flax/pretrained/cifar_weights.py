"""Public weights of CIFAR ResNets: the tensor names of two families of files, and the order of their channels.

https://github.com/akamaster/pytorch_resnet_cifar10 (`linear`; shortcuts without parameters, which pad zero channels
on both sides) and https://github.com/chenyaofo/pytorch-cifar-models (`fc`, `downsample`; other programs use these
names too). The networks: He et al. 2016, section 4.2, https://arxiv.org/abs/1512.03385.
"""

import re
from collections.abc import Mapping

import numpy as np

Path = tuple[str, ...]
_MODEL = re.compile(r"cifar_resnet(\d+)")
BOTH_SIDES = "pytorch_resnet_cifar10/"
_OTHERS = "pytorch-cifar-models/cifar_"
BLOCK = (r"^stage(\d+)_block(\d+)", lambda match: f"layer{match[1]}.{int(match[2]) - 1}")


def cifar_peers(model: str) -> list[str]:
    """Returns the names of our `model` in both families of files; an empty list if it is not a CIFAR ResNet."""
    match = _MODEL.fullmatch(model)
    return [f"{family}resnet{match[1]}" for family in (BOTH_SIDES, _OTHERS)] if match else []


def is_cifar(peer: str | None) -> bool:
    """Returns whether a peer is one of `cifar_peers`."""
    return peer is not None and peer.startswith((BOTH_SIDES, _OTHERS))


def cifar_rules(peer: str) -> tuple:
    """Returns the substitutions that convert our module path to a peer's name, see torch_names.py."""
    head, shortcut = ("linear", "shortcut") if peer.startswith(BOTH_SIDES) else ("fc", "downsample")
    return (
        ("^stem_conv", "conv1"),
        ("^stem_norm", "bn1"),
        ("^classifier", head),
        BLOCK,
        ("downsample_conv", f"{shortcut}.0"),
        ("downsample_norm", f"{shortcut}.1"),
        ("/norm", "/bn"),
    )


def our_order(arrays: Mapping[Path, np.ndarray]) -> dict[Path, np.ndarray]:
    """Reorders the channels of a network's arrays to the order of our shortcut option A.

    In the peer, a stage's first shortcut pads half of its zero channels before the others and half after them; ours
    pads all of them after. The blocks of a stage add to its shortcut, so the outputs of each block's last convolution
    and the inputs of all layers that read the sum are permuted accordingly. The channels inside a block keep their
    order.

    Args:
        arrays: arrays of a network without parameters in its shortcuts, under our names and with our axes.
    """
    if ("params", "stem_norm", "scale") not in arrays:
        return dict(arrays)  # another network; the caller reports it
    width = arrays["params", "stem_norm", "scale"].size
    orders = [np.arange(width)] * 2  # the stem's order, then each stage's; the first stage keeps the stem's
    for _ in range(2):
        before, half = orders[-1], len(orders[-1]) // 2
        after = np.arange(half + len(before), 2 * len(before))
        orders.append(np.concatenate([before + half, np.arange(half), after]))
    return {path: _reordered(path, array, orders) for path, array in arrays.items()}


def _reordered(path: Path, array: np.ndarray, orders: list[np.ndarray]) -> np.ndarray:
    block = re.fullmatch(r"stage(\d)_block(\d+)", path[1])
    stage = int(block[1]) if block else 3
    if path[1:] == ("classifier", "kernel"):
        axis, order = -2, orders[stage]
    elif block and path[2] == "conv1":
        axis, order = -2, orders[stage if int(block[2]) > 1 else stage - 1]
    elif block and path[2] in ("conv2", "norm2"):
        axis, order = -1, orders[stage]
    else:
        return array
    if array.ndim < -axis or array.shape[axis] != len(order):
        return array  # of another shape; the caller reports it
    return array.take(order, axis)
