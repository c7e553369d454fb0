"""Registry of attentions by name: `create_attention("hga", channels, **options)`."""

import collections.abc
import contextlib
import dataclasses
import difflib
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from hga_flax.attention.cbam import ConvolutionalBlockAttention
from hga_flax.attention.common import Source, check_result
from hga_flax.attention.eca import EfficientChannelAttention
from hga_flax.attention.gc import GlobalContext
from hga_flax.attention.ge import GatherExcite
from hga_flax.attention.hga import HGA
from hga_flax.attention.identity_start import IdentityStart
from hga_flax.attention.nl import NonLocal
from hga_flax.attention.se import SqueezeExcitation
from hga_flax.attention.sk import SelectiveKernel

# Blocks take a factory: called with the number of channels and a name, it returns a module that maps
# (x [B, H, W, C], train) to the same shape.
AttentionFactory = Callable[..., nn.Module]

_COMMON = {"name", "dtype", "axis_name"}  # set by the network, not by the user
IDENTITY_START = "identity_start"  # an option of every attention that follows a block's last norm
_REGISTRY: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {}


class NoAttention(nn.Module):
    """The identity, for networks without attention."""

    channels: int
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return x


def register_attention(name: str, module: type[nn.Module], **preset: Any) -> None:
    """Registers `module` under `name`, with `preset` overriding its defaults.

    The fields of the module must be `channels`, then its options, then `dtype` and `axis_name`; it is
    called with (x `[B, H, W, C]`, train). The class attribute `replaces_convolution = True` makes it
    replace a block's 3x3 (see `replaces_convolution`); `given_by_block` lists the fields that the block
    sets, which are not options. A class may be registered again under its name once it is defined anew, as when a
    notebook's cell is run again.

    Raises:
        ValueError: the name is empty or taken.
        TypeError: `module` is not a Linen module class with these fields, an option has no default, or `preset` names
            no field or has a value of another type.

    Examples:
        >>> register_attention("se4", SqueezeExcitation, ratio=4)  # doctest: +SKIP
        >>> create_attention("se4", 64).ratio  # doctest: +SKIP
        4
    """
    if not name:
        raise ValueError("an attention needs a name")
    if name in _REGISTRY and not _is_same(_REGISTRY[name], (module, preset)):
        raise ValueError(f"attention '{name}' is already registered; choose another name")
    fields = {field.name: field for field in dataclasses.fields(module)} if dataclasses.is_dataclass(module) else {}
    if not fields.keys() >= _COMMON | {"channels"}:
        raise TypeError(
            f"attention '{name}' must be a Linen module class with the fields channels, dtype and axis_name; "
            "pass a function as attention= instead"
        )
    if IDENTITY_START in fields:
        raise TypeError(f"attention '{name}': {IDENTITY_START} is an option of every attention; rename the field")
    for option in preset:
        if option not in fields and not (option == IDENTITY_START and _follows_norm(module)):
            raise TypeError(f"attention '{name}': {module.__name__} has no field '{option}'{_nearest(option, fields)}")
    if not isinstance(preset.get(IDENTITY_START, False), bool):
        raise TypeError(f"attention '{name}': {IDENTITY_START}={preset[IDENTITY_START]!r} must be of type bool")
    try:
        check_types(f"attention '{name}'", module, {key: preset[key] for key in preset if key != IDENTITY_START})
    except ValueError as error:
        raise TypeError(str(error)) from None
    for option in fields.keys() - _set_by_network(module) - preset.keys():
        if _default(fields[option]) is dataclasses.MISSING:
            raise TypeError(f"attention '{name}': option '{option}' needs a default")
    _REGISTRY[name] = (module, preset)


def _is_same(old: tuple[type[nn.Module], dict[str, Any]], new: tuple[type[nn.Module], dict[str, Any]]) -> bool:
    """Returns whether `new` is `old`, or its class defined anew."""
    place = lambda module: (module.__module__, getattr(module, "__qualname__", ""))
    return old == new or (old[0] is not new[0] and place(old[0]) == place(new[0]))


def _set_by_network(module: type[nn.Module]) -> set[str]:
    return _COMMON | {"channels", "parent"} | set(getattr(module, "given_by_block", ()))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def attention_names() -> list[str]:
    """Returns the registered names, "none" first.

    Examples:
        >>> attention_names()[:4]
        ['none', 'hga', 'hga_table2', 'se']
    """
    return list(_REGISTRY)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_attention(name: str, more: Iterable[str] = ()) -> None:
    """Raises a ValueError that lists the known names unless `name` is registered or one of `more`."""
    known = [*_REGISTRY, *more]
    if name not in known:
        raise ValueError(f"unknown attention '{name}'{_nearest(name, known)}; known: {', '.join(known)}")


def attention_options(name: str) -> dict[str, Any]:
    """Returns the options of an attention and their defaults, with its preset applied.

    Every attention that follows a block's last norm also has `identity_start` (default False), see `IdentityStart`.

    Raises:
        ValueError: no attention has this name.

    Examples:
        >>> attention_options("se")
        {'ratio': 16, 'bias': True, 'min_channels': 1, 'identity_start': False}
    """
    check_attention(name)
    module, preset = _REGISTRY[name]
    hidden = _set_by_network(module)
    options = {f.name: _default(f) for f in dataclasses.fields(module) if f.name not in hidden}
    return options | ({IDENTITY_START: False} if _follows_norm(module) else {}) | preset


def _follows_norm(module: type[nn.Module]) -> bool:
    return module is not NoAttention and not getattr(module, "replaces_convolution", False)


def create_attention(attention: str, /, channels: int, **options: Any) -> nn.Module:
    """Creates a registered attention for maps of `channels` channels.

    Args:
        attention: one of `attention_names()`.
        channels: number of channels C of the map `[B, H, W, C]` that the module will gate.
        **options: options of the attention; `dtype`, `axis_name` and Flax's `name` are always allowed.

    Raises:
        ValueError: see `attention_factory`.

    Examples:
        >>> x = jax.numpy.ones((2, 8, 8, 64))
        >>> create_attention("hga", 64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """
    return attention_factory(attention, **{k: v for k, v in options.items() if k not in _COMMON})(
        channels, **{k: v for k, v in options.items() if k in _COMMON}
    )


def attention_factory(name: str, **options: Any) -> AttentionFactory:
    """Returns the factory that a network takes: `factory(channels, name=..., dtype=..., axis_name=...)`.

    Raises:
        ValueError: the attention is unknown or has no such option, or an option has the wrong type.
    """
    known = attention_options(name)
    for option in options:
        if option not in known:
            close = _nearest(option, known)
            has = ", ".join(known) or "none"
            raise ValueError(f"attention '{name}' has no option '{option}'{close}; it has: {has}")
    module, _ = _REGISTRY[name]
    chosen = known | options
    starts = chosen.pop(IDENTITY_START, False)
    if not isinstance(starts, bool):
        raise ValueError(f"attention '{name}': option {IDENTITY_START}={starts!r} must be of type bool")
    check_types(f"attention '{name}'", module, {option: chosen[option] for option in options if option in chosen})
    factory = partial(module, **chosen)
    return partial(IdentityStart, attention=factory) if starts else factory


def replaces_convolution(factory: AttentionFactory) -> bool:
    """Returns whether the attention replaces a block's 3x3, norm and ReLU instead of following its last norm.

    Such a factory is called with (channels, stride=..., replaced_groups=..., name=..., dtype=...,
    axis_name=...), and its module maps `[B, H, W, D]` to `[B, H / stride, W / stride, channels]`.
    """
    while isinstance(factory, partial):
        factory = factory.func
    return getattr(factory, "replaces_convolution", False)


def uses_source(factory: AttentionFactory) -> bool:
    """Returns whether the attention's module accepts (x, train, source), see `hga_flax.attention.Source`."""
    while isinstance(factory, partial):
        factory = factory.keywords["attention"] if factory.func is IdentityStart else factory.func
    module: Any = factory
    if not getattr(module, "uses_source", False):
        return False
    return "source" in inspect.signature(module.__call__).parameters  # a subclass may have a `__call__` of its own


def _named(module: nn.Module) -> nn.Module:
    """Raises a ValueError unless the factory has passed the name on: counts, weights and pictures go by it."""
    if isinstance(module, nn.Module) and module.name != "attention":
        raise ValueError(
            f"the attention factory has made a module named {module.name!r}; it must pass name, dtype and axis_name on"
        )
    return module


def attend(factory: AttentionFactory, x: jax.Array, train: bool, *source: Source) -> jax.Array:
    """Applies an attention to the map at the end of a block, `[B, H, W, C]`, as the block's submodule "attention".

    Args:
        factory: the block's attention.
        x: the map.
        train: True in training.
        *source: the factors of the map, for an attention that uses them, see `Source`.

    Raises:
        ValueError: the attention returns a map of another shape.
    """
    module = _named(factory(x.shape[-1], name="attention"))
    return check_result(module, module(x, train, *source), x.shape)


def attend_in_place(
    factory: AttentionFactory, x: jax.Array, train: bool, channels: int, stride: int = 1, groups: int = 1
) -> jax.Array:
    """Applies an attention in place of a block's 3x3: `[B, H, W, D]` -> `[B, H / stride, W / stride, channels]`.

    Raises:
        ValueError: the attention returns a map of another shape.
    """
    module = _named(factory(channels, stride=stride, replaced_groups=groups, name="attention"))
    batch, height, width, _ = x.shape
    return check_result(module, module(x, train), (batch, -(-height // stride), -(-width // stride), channels))


def fits(value: Any, declared: Any) -> bool:
    """Returns whether a value matches a declared type; types that are not handled here match every value."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin in (collections.abc.Sequence, tuple, list) and not inner:
        return isinstance(value, tuple | list)
    if origin in (collections.abc.Sequence, tuple, list):
        if not isinstance(value, tuple | list):
            return False
        if origin is not tuple or inner[1:] == (...,):
            return all(fits(entry, inner[0]) for entry in value)
        return len(value) == len(inner) and all(fits(entry, kind) for entry, kind in zip(value, inner, strict=True))
    if declared is float:
        if isinstance(value, int):
            return not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return isinstance(value, float | np.integer | np.floating) and math.isfinite(value)
    if declared is int:
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and abs(int(value)) < 2**31
    if declared in (bool, str, types.NoneType):
        return isinstance(value, declared)
    return True


def check_types(what: str, module: type, options: dict[str, Any]) -> None:
    """Checks the types of options against the fields of a module.

    Args:
        what: name of the module in messages, for example "attention 'hga'".
        module: a dataclass, as every Linen module is.
        options: values by name; every name must be a field.

    Raises:
        ValueError: an option has the wrong type; the message names it, its value and the expected type.
    """
    declared = {field.name: field.type for field in dataclasses.fields(module)}
    with contextlib.suppress(Exception):  # texts, from `from __future__ import annotations`, with names that are gone
        declared |= typing.get_type_hints(module)
    for name, value in options.items():
        if not fits(value, declared[name]):
            kind = declared[name]
            shown = kind.__name__ if isinstance(kind, type) else str(kind).replace("collections.abc.", "")
            raise ValueError(f"{what}: option {name}={value!r} must be of type {shown}")


register_attention("none", NoAttention)
register_attention("hga", HGA)
# The simplest configuration we found that has Table 2's parameter counts (see docs/paper.md).
register_attention("hga_table2", HGA, group_size=2, mfe_norm=True, restore_norm=True)
register_attention("se", SqueezeExcitation)
register_attention("sk", SelectiveKernel)
register_attention("eca", EfficientChannelAttention)
register_attention("cbam", ConvolutionalBlockAttention)
register_attention("gc", GlobalContext)
register_attention("ge", GatherExcite)
register_attention("nl", NonLocal)
