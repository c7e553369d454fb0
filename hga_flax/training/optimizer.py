"""The learning-rate schedule and the optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hga_flax.errors import ConfigError
from hga_flax.training.norm import clip_by_global_norm
from hga_flax.training.parameters import by_parameter


def warmup_steps(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> int:
    """Returns the number of warm-up steps of a run of `total_steps`; a warm-up of less than a step has one."""
    schedule = config.schedule
    if schedule.warmup_share:  # rounded down, so that it always ends before training does
        steps = int(schedule.warmup_share * total_steps + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return min(max(1, steps), total_steps - 1)
    if schedule.warmup_epochs:
        return max(min(1, total_steps - 1), round(schedule.warmup_epochs * steps_per_epoch))
    return int(schedule.warmup_steps)


def decay_steps(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> list[int]:
    """Returns the steps at which the schedule "step" decays, in ascending order; [] for other schedules.

    Raises:
        ConfigError: there would be more than one decay per step.
    """
    schedule = config.schedule
    if schedule.name != "step":
        return []
    if schedule.decay_at_steps:
        return list(schedule.decay_at_steps)
    every = schedule.decay_every_epochs * steps_per_epoch
    if every < 1:
        raise ConfigError(
            f"schedule.decay_every_epochs={schedule.decay_every_epochs}: is less than a step; an epoch has "
            f"{steps_per_epoch:.4g} steps"
        )
    return [max(1, round(every * (i + 1))) for i in range(int(total_steps / every))]


def create_schedule(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    "step" multiplies the rate by `decay_factor` every `decay_every_epochs` (or at `decay_at_steps`), counted
    from the start of training, as in the papers. "cosine" and "linear" decay from the end of the warm-up to
    `end_learning_rate` at the end of training ("linear" with a warm-up is the one-cycle policy of Smith and Topin,
    https://arxiv.org/abs/1708.07120). During the warm-up the rate rises linearly or is constant (Identity
    Mappings: 0.01 for 400 steps).

    Raises:
        ConfigError: the warm-up or a decay does not fit into the training epochs.
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    warmup = warmup_steps(config, steps_per_epoch, total_steps)
    boundaries = decay_steps(config, steps_per_epoch, total_steps)
    # A run cut short by training.steps, to try out a recipe, may end within its warm-up or before a decay.
    if not config.training.steps:
        if warmup >= total_steps:
            key = "warmup_steps" if schedule.warmup_steps else "warmup_epochs"
            raise ConfigError(
                f"schedule.{key}={schedule[key]}: a warm-up of {warmup} steps does not fit in {total_steps} steps of "
                "training; lower it"
            )
        if schedule.decay_at_steps and boundaries[-1] >= total_steps:
            raise ConfigError(
                f"schedule.decay_at_steps={schedule.decay_at_steps}: training ends at step {total_steps}; "
                "lower them or raise training.epochs"
            )
    if schedule.name == "step":
        main = lambda step: peak * jnp.prod(jnp.where(step >= jnp.asarray(boundaries), schedule.decay_factor, 1.0))
        main = main if len(boundaries) else optax.constant_schedule(peak)
    elif schedule.name == "cosine":
        lowest = schedule.end_learning_rate / peak
        decay = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), lowest)
        main = lambda step: decay(step - warmup)
    elif schedule.name == "linear":
        decay = optax.linear_schedule(peak, schedule.end_learning_rate, max(1, total_steps - warmup))
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
    """Returns a tree of booleans: False for parameters with at most one dimension.

    These are norms, biases and the shares of an identity start.
    """
    return jax.tree.map(lambda p: p.ndim > 1, params)


def create_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the configured optimizer.

    The gradient is first clipped by its global norm (Pascanu et al., https://arxiv.org/abs/1211.5063).

    "sgd": SGD with momentum; weight decay is added to the gradient before the momentum, as in the baselines' code.
    "adamw": Loshchilov and Hutter, https://arxiv.org/abs/1711.05101; the decay is scaled only by the learning rate.
    "lamb": You et al., https://arxiv.org/abs/1904.00962, algorithm 2: AdamW's update, scaled per array by the
    ratio of the array's norm to the update's. With decay_norm_and_bias=False, norms and biases are neither decayed
    nor scaled, as in the authors' code; with True they are scaled, even if there is no weight decay.

    The state's structure depends only on `optimizer.name`, so every other key may change when a run is resumed.
    Therefore SGD keeps a momentum buffer even if the momentum is 0, and frozen parameters have one too.
    """
    optimizer = config.optimizer
    mask = None if optimizer.decay_norm_and_bias else decays
    clip = optax.identity()
    if optimizer.clip_norm:
        clip = optax.stateless(lambda updates, params: clip_by_global_norm(updates, optimizer.clip_norm))
    decay = optax.stateless(lambda updates, params: _add_decay(optimizer.weight_decay, mask, updates, params))
    if optimizer.name == "sgd":
        update = optax.chain(clip, decay, optax.sgd(schedule, optimizer.momentum, optimizer.nesterov))
        return by_parameter(config, update)
    steps = [clip, optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps), decay]
    if optimizer.name == "lamb":
        steps.append(optax.stateless(lambda updates, params: _scale_by_trust_ratio(mask, updates, params)))
    return by_parameter(config, optax.chain(*steps, optax.scale_by_learning_rate(schedule)))


def _add_decay(rate: float, mask: Callable[[Any], Any] | None, updates: Any, params: Any) -> Any:
    """Does the same as `optax.add_decayed_weights`, without a state whose structure depends on the mask."""
    if not rate:
        return updates
    wanted = mask(params) if mask else jax.tree.map(lambda _: True, params)
    return jax.tree.map(lambda u, p, add: u + rate * p if add else u, updates, params, wanted)


def _scale_by_trust_ratio(mask: Callable[[Any], Any] | None, updates: Any, params: Any) -> Any:
    """Applies `optax.scale_by_trust_ratio` to the arrays selected by the mask, without a state of its own."""
    scaled, _ = optax.scale_by_trust_ratio().update(updates, optax.EmptyState(), params)
    wanted = mask(params) if mask else jax.tree.map(lambda _: True, params)
    return jax.tree.map(lambda new, old, scale: new if scale else old, scaled, updates, wanted)
