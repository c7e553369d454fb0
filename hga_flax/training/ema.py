"""The exponential moving average of the weights: parameters and batch statistics alike."""

from typing import Any

import jax
import jax.numpy as jnp


def decay_at(decay: float, update: jax.Array) -> jax.Array:
    """Returns min(decay, (1 + t) / (10 + t)) for update t = 0, 1, ..., float32.

    TensorFlow's warm-up (tf.train.ExponentialMovingAverage, `num_updates`), in the place of a correction of the bias
    to the initial weights: the average first forgets them fast, so that it serves in short runs too.
    """
    t = update.astype(jnp.float32)
    return jnp.minimum(decay, (1 + t) / (10 + t))


def update_ema(ema: Any, new: Any, decay: float, update: jax.Array) -> Any:
    """Returns d * ema + (1 - d) * new, leaf by leaf, with d = `decay_at(decay, update)`.

    Args:
        ema: the average so far, {"params", "batch_stats"}, float32.
        new: the weights after the step, of the same structure.
        decay: share of the average that stays, once it has warmed up.
        update: number of updates before, int32 scalar.
    """
    d = decay_at(decay, update)
    return jax.tree.map(lambda old, now: d * old + (1 - d) * now, ema, new)
