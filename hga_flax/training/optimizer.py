"""The learning rate's schedule and the optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hga_flax.errors import ConfigError


def warmup_steps(config: ConfigDict, steps_per_epoch: float) -> int:
    """Returns the length of the warm-up in optimizer steps."""
    return config.schedule.warmup_steps or round(config.schedule.warmup_epochs * steps_per_epoch)


def create_schedule(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    "step" multiplies by `decay_factor` every `decay_every_epochs` (or at `decay_at_steps`), counted
    from the start of training as the papers count; "cosine" falls to zero at the end, from the end
    of the warm-up on. During the warm-up the rate rises linearly or holds (Identity Mappings:
    0.01 for 400 steps).

    Raises:
        ConfigError: the warm-up does not end before the training's epochs do.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    warmup = warmup_steps(config, steps_per_epoch)
    # A run cut short by training.steps may end within its warm-up: that is how one tries a recipe.
    if warmup >= total_steps and not config.training.steps:
        raise ConfigError(
            f"schedule: a warm-up of {warmup} steps in a training of {total_steps}; "
            "lower schedule.warmup_epochs or schedule.warmup_steps"
        )
    if schedule.name == "step":
        every = schedule.decay_every_epochs * steps_per_epoch
        count = int(total_steps / every)
        boundaries = schedule.decay_at_steps or [max(1, round(every * (i + 1))) for i in range(count)]
        # Repeated products, not a mapping: two decays may fall on one step in a very short run.
        main = lambda step: peak * jnp.prod(jnp.where(step >= jnp.asarray(boundaries), schedule.decay_factor, 1.0))
        main = main if len(boundaries) else optax.constant_schedule(peak)
    elif schedule.name == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup))
        main = lambda step: decay(step - warmup)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    start = schedule.warmup_learning_rate
    constant = schedule.warmup_shape == "constant"
    before = optax.constant_schedule(start) if constant else optax.linear_schedule(start, peak, warmup)
    return lambda step: jnp.where(step < warmup, before(step), main(step))


def decays(params: Any) -> Any:
    """Returns the tree of booleans that is false for norms and biases (parameters of one dimension)."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def create_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """SGD with momentum; weight decay joins the gradient before the momentum, as in the baselines' code."""
    optimizer = config.optimizer
    mask = None if optimizer.decay_norm_and_bias else decays
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay, mask) if optimizer.weight_decay else optax.identity(),
        optax.sgd(schedule, optimizer.momentum or None, optimizer.nesterov),
    )
