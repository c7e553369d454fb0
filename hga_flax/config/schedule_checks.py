"""Checks that the keys of `config.schedule` are consistent. Does not load JAX."""

from ml_collections import ConfigDict

from hga_flax.errors import ConfigError


def check_schedule(schedule: ConfigDict, peak: float) -> None:
    """Checks the keys of `config.schedule` against each other and against the peak learning rate.

    Raises:
        ConfigError: values conflict; the message names a key, its value and how to resolve the conflict.
    """
    if schedule.name in ("cosine", "linear") and schedule.end_learning_rate > peak:
        raise ConfigError(
            f"schedule.end_learning_rate={schedule.end_learning_rate}: is above the peak, "
            f"optimizer.learning_rate={peak}"
        )
    steps = list(schedule.decay_at_steps)
    if steps and schedule.name != "step":
        raise ConfigError(
            f"schedule.decay_at_steps={schedule.decay_at_steps}: only schedule.name='step' decays at steps; "
            "choose it, or set schedule.decay_at_steps=()"
        )
    if steps != sorted(set(steps)):
        raise ConfigError(
            f"schedule.decay_at_steps={schedule.decay_at_steps}: must ascend, such as {tuple(sorted(set(steps)))}"
        )
    lengths = [key for key in ("warmup_share", "warmup_epochs", "warmup_steps") if schedule[key]]
    if len(lengths) > 1:
        one, other = lengths[:2]
        raise ConfigError(
            f"schedule.{one}={schedule[one]}: schedule.{other}={schedule[other]} is the length of the warm-up; "
            "set one of them to 0"
        )
    if lengths and schedule.warmup_shape == "constant" and not schedule.warmup_learning_rate:
        raise ConfigError(
            "schedule.warmup_learning_rate=0.0: a constant warm-up would train at a rate of 0; set it above 0"
        )
