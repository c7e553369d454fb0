"""The norm of a gradient, computed as suits the device."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hga_flax.attention.platforms import on_gpus

SMALL_LEAF = 32_768  # values of an array that is summed up together with others
TOGETHER = 64  # arrays at most in one sum: XLA's kernels for GPUs have at most 96 operands and results


def global_norm(tree: Any) -> jax.Array:
    """Returns the square root of the sum of all squares in a tree of arrays, as `optax.tree.norm`.

    On GPUs small arrays are laid end to end and squared together: a sum for each would be one or two launches for
    each. Other platforms run optax's own program. benchmarks/NOTES.md has the measurements.

    Example: `global_norm({"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)})` is 3.
    """
    return lax.platform_dependent(tree, default=optax.tree.norm, **on_gpus(norm_of_concatenated))


def norm_of_concatenated(tree: Any) -> jax.Array:
    """Returns the same from few sums: small arrays are laid end to end first."""
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size <= SMALL_LEAF]
    parts = [leaf for leaf in leaves if leaf.size > SMALL_LEAF]
    parts += [jnp.concatenate(small[i : i + TOGETHER]) for i in range(0, len(small), TOGETHER)]
    return optax.tree.norm(parts)


def clip_by_global_norm(tree: Any, limit: float) -> Any:
    """Returns the tree, scaled down to a norm of `limit` where its own is above it, as `optax.clip_by_global_norm`.

    It takes `global_norm`, so that a step that reports the norm too computes it once.
    """
    norm = global_norm(tree)
    return jax.tree.map(lambda leaf: jnp.where(norm < limit, leaf, leaf / norm.astype(leaf.dtype) * limit), tree)
