"""Exponential moving average of the weights: parameters and batch statistics."""

from typing import Any

import jax
import jax.numpy as jnp


def decay_at(decay: float, update: jax.Array) -> jax.Array:
    """Returns min(decay, (1 + t) / (10 + t)) for update t = 0, 1, ..., float32.

    This is TensorFlow's warm-up (tf.train.ExponentialMovingAverage, `num_updates`), used instead of a bias
    correction: the average forgets the initial weights quickly at first, so that it is useful in short runs too.
    """
    t = update.astype(jnp.float32)
    return jnp.minimum(decay, (1 + t) / (10 + t))


def update_ema(ema: Any, new: Any, decay: float, update: jax.Array) -> Any:
    """Returns d * ema + (1 - d) * new, leaf by leaf, with d = `decay_at(decay, update)`.

    Args:
        ema: current average, {"params", "batch_stats"}, float32.
        new: weights after the step, with the same structure.
        decay: fraction of the average that is kept per update, after the warm-up.
        update: number of previous updates, int32 scalar.
    """
    d = decay_at(decay, update)
    return jax.tree.map(lambda old, now: d * old + (1 - d) * now, ema, new)
