"""Registry of networks by name: `create_model("resnet50", attention="hga", num_classes=1000)`."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from hga_flax.attention import AttentionFactory, attention_factory, replaces_convolution
from hga_flax.attention.registry import check_types
from hga_flax.errors import nearest
from hga_flax.models import densenet, res2net, resnest, resnet, vgg
from hga_flax.models.cifar_resnet import CifarResNet, blocks_per_stage, wide_depth
from hga_flax.models.googlenet import GoogLeNet
from hga_flax.models.stage_maps import StageMaps

_NAMED: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.ResNet18,
    "resnet34": resnet.ResNet34,
    "resnet50": resnet.ResNet50,
    "resnet101": resnet.ResNet101,
    "resnet152": resnet.ResNet152,
    "resnext50_32x4d": resnet.ResNeXt50,
    "resnext101_32x4d": resnet.ResNeXt101,
    "resnext101_32x8d": resnet.ResNeXt101Wide,
    "resnext101_64x4d": resnet.ResNeXt101Groups64,
    "wide_resnet50_2": resnet.WideResNet50,
    "wide_resnet101_2": resnet.WideResNet101,
    "googlenet": GoogLeNet,
    "densenet121": densenet.DenseNet121,
    "densenet161": densenet.DenseNet161,
    "densenet169": densenet.DenseNet169,
    "densenet201": densenet.DenseNet201,
    **vgg.NETWORKS,
    **res2net.NETWORKS,
    **resnest.NETWORKS,
}
_CIFAR = re.compile(r"cifar_(preact_)?resnet(\d+)(_bottleneck)?")
_WIDE = re.compile(r"cifar_wide_resnet(\d+)_(\d+)")
CIFAR_PATTERN = "cifar_[preact_]resnet{DEPTH}[_bottleneck]"
WIDE_PATTERN = "cifar_wide_resnet{DEPTH}_{WIDEN}"


def model_names() -> list[str]:
    """Returns the fixed names; CIFAR networks also exist in every depth (`CIFAR_PATTERN`, `WIDE_PATTERN`).

    Examples:
        >>> model_names()[:3]
        ['resnet18', 'resnet34', 'resnet50']
    """
    return list(_NAMED)


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in _NAMED:
        return _NAMED[name]
    match = _WIDE.fullmatch(name)
    if match:
        if int(match[2]) < 1:
            raise ValueError(f"model '{name}': the widening factor is not positive")
        return partial(CifarResNet, depth=wide_depth(int(match[1])), preact=True, widen=int(match[2]))
    match = _CIFAR.fullmatch(name)
    if not match:
        known = [*_NAMED, CIFAR_PATTERN, WIDE_PATTERN]
        raise ValueError(f"unknown model '{name}'{nearest(name, _NAMED)}; known: {', '.join(known)}")
    preact, depth, bottleneck = bool(match[1]), int(match[2]), bool(match[3])
    blocks_per_stage(depth, bottleneck)  # raises for a bad depth now instead of at the first call
    return partial(CifarResNet, depth=depth, preact=preact, bottleneck=bottleneck)


def model_options(name: str) -> dict[str, Any]:
    """Returns the structural options of a model, such as `zero_init_residual`, and their defaults.

    Raises:
        ValueError: no model has this name.

    Examples:
        >>> model_options("resnet50")["zero_init_residual"]
        False
    """
    builder: Any = _builder(name)
    given: dict[str, Any] = {}
    while isinstance(builder, partial):
        given = builder.keywords | given
        builder = builder.func
    hidden = {"num_classes", "attention", "dtype", "axis_name", "parent", "name"}
    if _CIFAR.fullmatch(name):
        hidden |= {"depth", "bottleneck", "preact"}  # set by the name
    elif _WIDE.fullmatch(name):
        hidden |= {"depth", "bottleneck", "preact", "widen"}
    return {f.name: given.get(f.name, f.default) for f in dataclasses.fields(builder) if f.name not in hidden}


def _model_class(builder: Any) -> type[nn.Module]:
    while isinstance(builder, partial):
        builder = builder.func
    return builder


def _is_count(option: str, default: Any) -> bool:
    """Returns whether an option must be at least 1; 0 for `stem_width` is the plain stem."""
    return isinstance(default, int) and not isinstance(default, bool) and default > 0 and option != "stem_width"


def create_model(
    name: str,
    *,
    attention: str | AttentionFactory = "none",
    attention_options: dict[str, Any] | None = None,
    num_classes: int = 1000,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    features_only: bool = False,
    **options: Any,
) -> nn.Module:
    """Creates a network; `model.apply(variables, x, train=False)` maps `[B, H, W, C]` to logits `[B, num_classes]`.

    Args:
        name: one of `model_names()`, or a CIFAR network such as "cifar_resnet110",
            "cifar_preact_resnet164_bottleneck", "cifar_wide_resnet28_10".
        attention: one of `attention_names()`, or your own factory: called with (channels, name=...,
            dtype=..., axis_name=...), it returns a module that maps (x `[B, H, W, C]`, train) to the same shape.
        attention_options: options of a named attention, for example `{"kernels": (7,)}`.
        num_classes: number of classes.
        dtype: dtype of the computation; parameters and statistics stay float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.
        features_only: return the feature maps of the stages instead of logits, see `StageMaps`.
        **options: structural options of the network, see `model_options`.

    Raises:
        ValueError: an unknown name or option (the message lists the known ones), an option of the wrong type, no
            classes, or an attention that replaces a 3x3 in a network whose blocks have no single 3x3 that feeds a ReLU.

    Examples:
        >>> import jax
        >>> model = create_model("cifar_resnet8", attention="hga", num_classes=10)
        >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 32, 32, 3)))[0].shape
        (2, 10)
    """
    builder = _builder(name)
    if not isinstance(num_classes, int | np.integer) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r} must be a positive integer")
    known = model_options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"model '{name}' has no option '{option}'{nearest(option, known)}; it has: {', '.join(known)}"
            )
    check_types(f"model '{name}'", _model_class(builder), options)
    for option, value in options.items():
        counts = value if option.endswith("_sizes") else (value,) if _is_count(option, known[option]) else ()
        if any(count < 1 for count in counts) or (option.endswith("_sizes") and not counts):
            raise ValueError(f"model '{name}': {option}={value} is not positive")
    if isinstance(attention, str):
        attention = attention_factory(attention, **(attention_options or {}))
    elif attention_options:
        raise ValueError("attention_options need a named attention; bind the options of your own factory yourself")
    elif not callable(attention):
        raise ValueError(f"attention={attention!r} must be a name ('none' for no attention) or a factory of modules")
    if replaces_convolution(attention) and not getattr(_model_class(builder), "hosts_convolution", False):
        raise ValueError(
            f"model '{name}' has no place for an attention that replaces a 3x3 convolution, as 'sk' does; "
            "the ResNets, ResNeXts, Wide ResNets and CIFAR nets have one"
        )
    network = builder(num_classes=num_classes, attention=attention, dtype=dtype, axis_name=axis_name, **options)
    return StageMaps(network) if features_only else network
