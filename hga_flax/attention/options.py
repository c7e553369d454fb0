"""Do the options of a network or an attention have the types that its fields declare?"""

import collections.abc
import dataclasses
import math
import types
import typing
from typing import Any


def fits(value: Any, declared: Any) -> bool:
    """True where a value is of a declared type; a declaration that is no plain type fits everything."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin in (collections.abc.Sequence, tuple, list):
        return isinstance(value, tuple | list) and all(fits(entry, inner[0]) for entry in value)
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    if declared in (bool, str, types.NoneType):
        return isinstance(value, declared)
    return True


def check_types(what: str, module: type, options: dict[str, Any]) -> None:
    """Checks options against the fields of a module.

    Args:
        what: the module as messages call it, for example "attention 'hga'".
        module: a dataclass, as every Linen module is.
        options: by name; every name is a field.

    Raises:
        ValueError: names the option, its value and the type that it needs.
    """
    declared = {field.name: field.type for field in dataclasses.fields(module)}
    for name, value in options.items():
        if not fits(value, declared[name]):
            kind = declared[name]
            shown = kind.__name__ if isinstance(kind, type) else str(kind).replace("collections.abc.", "")
            raise ValueError(f"{what}: option {name}={value!r} must be of type {shown}")
