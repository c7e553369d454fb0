"""The networks by name: `create_model("resnet50", attention="hga", num_classes=1000)`."""

import dataclasses
import functools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from hga_flax.attention import AttentionFactory, attention_factory
from hga_flax.errors import nearest
from hga_flax.models import resnet
from hga_flax.models.cifar_resnet import CifarResNet, blocks_per_stage

_NAMED: dict[str, Callable[..., nn.Module]] = {
    "resnet50": resnet.ResNet50,
    "resnet101": resnet.ResNet101,
    "resnet152": resnet.ResNet152,
    "resnext50_32x4d": resnet.ResNeXt50,
    "resnext101_32x4d": resnet.ResNeXt101,
}
_CIFAR = re.compile(r"cifar_(preact_)?resnet(\d+)(_bottleneck)?")
CIFAR_PATTERN = "cifar_[preact_]resnet{DEPTH}[_bottleneck]"


def model_names() -> list[str]:
    """Returns the fixed names; CIFAR-style nets come beside them in every depth (`CIFAR_PATTERN`)."""
    return list(_NAMED)


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in _NAMED:
        return _NAMED[name]
    match = _CIFAR.fullmatch(name)
    if not match:
        known = [*_NAMED, CIFAR_PATTERN]
        raise ValueError(f"unknown model '{name}'{nearest(name, _NAMED)}; known: {', '.join(known)}")
    preact, depth, bottleneck = bool(match[1]), int(match[2]), bool(match[3])
    blocks_per_stage(depth, bottleneck)  # fails here, not at the first call
    return partial(CifarResNet, depth=depth, preact=preact, bottleneck=bottleneck)


def model_options(name: str) -> dict[str, Any]:
    """Returns the structural options of a model, such as `zero_init_residual`, with their defaults.

    Raises:
        ValueError: no model has this name.
    """
    builder = _builder(name)
    given: dict[str, Any] = {}
    while isinstance(builder, functools.partial):
        given = builder.keywords | given
        builder = builder.func
    hidden = {"num_classes", "attention", "dtype", "axis_name", "parent", "name"}
    if _CIFAR.fullmatch(name):
        hidden |= {"depth", "bottleneck", "preact"}  # the name says these
    return {f.name: given.get(f.name, f.default) for f in dataclasses.fields(builder) if f.name not in hidden}


def create_model(
    name: str,
    *,
    attention: str | AttentionFactory = "none",
    attention_options: dict[str, Any] | None = None,
    num_classes: int = 1000,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a network; `model.apply(variables, images, train=False)` gives logits.

    Args:
        name: one of `model_names()`, or a CIFAR-style net such as "cifar_resnet110",
            "cifar_preact_resnet164_bottleneck".
        attention: one of `attention_names()`, or your own factory: called with (channels, name=...,
            dtype=..., axis_name=...) it returns a module that maps (x `[B, H, W, C]`, train) to the same shape.
        attention_options: options of a named attention, for example `{"kernels": (7,)}`.
        num_classes: size of the output.
        dtype: dtype of the computation; parameters and statistics stay float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.
        **options: structural options of the network, see `model_options`.

    Raises:
        ValueError: an unknown name or option; the message lists the known ones.
    """
    builder = _builder(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"model '{name}' has no option '{option}'{nearest(option, known)}; it has: {', '.join(known)}"
            )
    if isinstance(attention, str):
        attention = attention_factory(attention, **(attention_options or {}))
    elif attention_options:
        raise ValueError("attention_options need a named attention; give your own factory its options itself")
    return builder(num_classes=num_classes, attention=attention, dtype=dtype, axis_name=axis_name, **options)
