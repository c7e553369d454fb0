"""The global norm of a gradient, with few kernel launches on GPUs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hga_flax.platforms import on_gpus, platform_dependent

SMALL_LEAF = 32_768  # largest size of an array that is summed together with others
TOGETHER = 64  # arrays per sum: XLA's GPU kernels have at most 96 operands and results


def global_norm(tree: Any) -> jax.Array:
    """Returns the square root of the sum of all squares in a tree of arrays, like `optax.tree.norm`.

    On GPUs small arrays are concatenated before summing, because separate sums take one or two launches per array.
    Other platforms run optax's own program. benchmarks/NOTES.md has the measurements.

    Example: `global_norm({"kernel": jnp.ones((3, 3)), "bias": jnp.zeros(3)})` is 3.
    """
    return platform_dependent(tree, default=optax.tree.norm, **on_gpus(norm_of_concatenated))


def norm_of_concatenated(tree: Any) -> jax.Array:
    """Computes the same norm with fewer sums by concatenating small arrays first."""
    leaves = jax.tree.leaves(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size <= SMALL_LEAF]
    parts = [leaf for leaf in leaves if leaf.size > SMALL_LEAF]
    parts += [jnp.concatenate(small[i : i + TOGETHER]) for i in range(0, len(small), TOGETHER)]
    return optax.tree.norm(parts)


def clip_by_global_norm(tree: Any, limit: float) -> Any:
    """Returns the tree, scaled down to norm `limit` if its norm is larger, like `optax.clip_by_global_norm`.

    Uses `global_norm`, so that a step that also reports the norm computes it only once.
    """
    norm = global_norm(tree)
    return jax.tree.map(lambda leaf: jnp.where(norm < limit, leaf, leaf / norm.astype(leaf.dtype) * limit), tree)
