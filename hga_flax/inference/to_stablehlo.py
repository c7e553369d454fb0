"""Serialises a JAX function as StableHLO with jax.export (https://docs.jax.dev/en/latest/export/export.html)."""

from collections.abc import Callable

import jax
from jax import export

PLATFORMS = ("cpu", "cuda", "tpu")  # one file runs on all of them


def to_stablehlo(function: Callable[[jax.Array], dict[str, jax.Array]], images: jax.ShapeDtypeStruct) -> bytes:
    """Returns the serialised program of a function, weights included.

    Args:
        function: maps one array to named arrays.
        images: shape (symbolic dimensions allowed) and dtype of the array.
    """
    return bytes(export.export(jax.jit(function), platforms=PLATFORMS)(images).serialize())


def load(program: bytes) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns the function serialised by `to_stablehlo`; running it needs only JAX."""
    return export.deserialize(bytearray(program)).call
