"""A JAX function as StableHLO, the serialised form of jax.export (https://docs.jax.dev/en/latest/export/export.html)."""

from collections.abc import Callable

import jax
from jax import export

PLATFORMS = ("cpu", "cuda", "tpu")  # one file runs on all of them


def to_stablehlo(function: Callable[[jax.Array], dict[str, jax.Array]], images: jax.ShapeDtypeStruct) -> bytes:
    """Returns the program of a function, weights included.

    Args:
        function: of one array to named arrays.
        images: shape, which may have a symbolic dimension, and dtype.
    """
    return bytes(export.export(jax.jit(function), platforms=PLATFORMS)(images).serialize())


def load(program: bytes) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns the function that `to_stablehlo` wrote; it needs nothing but JAX."""
    return export.deserialize(bytearray(program)).call
