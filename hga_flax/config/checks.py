"""Checks the values of configuration keys, one by one and together. Does not load JAX.

keys.py has the table of keys. Checks that need the network, the devices or the data set are in loading.py and
training/experiment.py.
"""

import math
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from hga_flax.config.keys import ALWAYS, KEYS, Rule
from hga_flax.config.schedule_checks import check_schedule
from hga_flax.errors import ConfigError, nearest

# The devices compute in float32: they treat numbers below the smallest normal one as 0, above the largest as infinite.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


def config_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns every key as a dotted path: "model.name", ..."""
    keys: list[str] = []
    for key, value in config.items():
        keys += config_keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return keys


def get_key(config: ConfigDict, key: str) -> Any:
    """Returns the value at a dotted path."""
    for part in key.split("."):
        config = config[part]
    return config


def complete(config: ConfigDict) -> ConfigDict:
    """Adds the keys that did not exist when the run was made, with the values that reproduce it; returns `config`."""
    with config.unlocked():
        for key, entry in KEYS.items():
            if entry.before is ALWAYS:
                continue
            group, _, name = key.partition(".")
            if group not in config:
                config[group] = ConfigDict()
            if isinstance(config[group], ConfigDict) and name not in config[group]:
                config[group][name] = entry.before
    return config


def check_keys(config: ConfigDict) -> None:
    """Checks that a configuration has exactly the known keys, each with a value of the right type and range.

    Raises:
        ConfigError: a key or value is wrong; the message names the key, its value and what is allowed.
    """
    keys = config_keys(config)
    for key in keys:
        inside = [known for known in KEYS if known.startswith(key + ".")]
        if inside:
            raise ConfigError(f"{key}={get_key(config, key)!r}: it is a group: {', '.join(inside)}")
        if key not in KEYS:
            groups = [] if "." in key else {rule.split(".")[0]: None for rule in KEYS}
            raise ConfigError(f"{key}: there is no such key{nearest(key, [*groups, *KEYS])}")
    for key in KEYS:
        if key not in keys:
            raise ConfigError(f"{key} is missing; begin a configuration with configs.base.get_config()")
    for key, entry in KEYS.items():
        _check_value(key, entry.rule, get_key(config, key))


def _check_value(key: str, rule: Rule, value: Any) -> None:
    entries = value if isinstance(value, tuple | list) else (value,)
    if rule.kind is float and any(_is(float, entry) and 0 < abs(entry) < SMALLEST for entry in entries):
        zero = "" if rule.above else "0 or "
        raise ConfigError(f"{key}={value}: is too small, the devices take it for 0; give {zero}at least {SMALLEST:.2g}")
    if rule.many:
        right = isinstance(value, tuple | list) and all(_is_entry(rule, v) for v in value)
        if not right or (not value and not rule.empty):
            raise ConfigError(f"{key}={value}: must be {KEYS[key].expects}")
        return
    if not _is(rule.kind, value):
        raise ConfigError(f"{key}={value!r}: must be {KINDS[rule.kind]}")
    if rule.kind is str and not value.isprintable():
        raise ConfigError(f"{key}={value!r}: must be a string without line breaks or control characters")
    if rule.choices and value not in rule.choices:
        raise ConfigError(f"{key}='{value}'{nearest(value, rule.choices)}; choose from: {', '.join(rule.choices)}")
    if rule.kind in (int, float) and not _inside(rule, value):
        bound = "above" if rule.above else "at least"
        upper = f" and at most {rule.high}" if rule.high != math.inf else " and finite"
        raise ConfigError(f"{key}={value}: must be {bound} {rule.low}{upper}")


def _is_entry(rule: Rule, value: Any) -> bool:
    return _is(rule.kind, value) and (value.isprintable() if rule.kind is str else _inside(rule, value))


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool):  # bool is a subclass of int
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _inside(rule: Rule, value: float) -> bool:
    return (rule.low < value or (value == rule.low and not rule.above)) and value <= min(rule.high, LARGEST)


def check_together(config: ConfigDict) -> None:
    """Checks that the values are consistent with each other, in a configuration that passes `check_keys`.

    Raises:
        ConfigError: values conflict; the message names a key, its value and how to resolve the conflict.
    """
    data = config.data
    if data.augmentation != "small" and data.crop_padding:
        raise ConfigError(
            f"data.crop_padding={data.crop_padding}: only data.augmentation='small' pads and crops; "
            "choose it, or set data.crop_padding=0"
        )
    if data.crop_padding >= data.image_size:
        raise ConfigError(
            f"data.crop_padding={data.crop_padding}: a crop of data.image_size={data.image_size} could miss the "
            f"image; at most {data.image_size - 1}"
        )
    if data.alternating_flip and not data.flip:
        raise ConfigError(
            "data.alternating_flip=True: data.flip=False mirrors no image; set data.flip=true, or "
            "data.alternating_flip=false"
        )
    if len({len(data.mean), len(data.std)} | {1}) > 2:
        raise ConfigError(f"data.std={data.std}: data.mean has {len(data.mean)} entries; give as many, or one")
    for key in ("name", "train_split", "eval_split"):
        if not data[key].strip():
            raise ConfigError(f"data.{key}='': name a {'data set' if key == 'name' else 'split'}")
    if data.augmentation == "none" and data.randaugment_ops:
        raise ConfigError(
            f"data.randaugment_ops={data.randaugment_ops}: data.augmentation='none' changes no image; choose 'small' "
            "or 'imagenet', or set data.randaugment_ops=0"
        )
    if config.optimizer.name == "sgd" and config.optimizer.nesterov and not config.optimizer.momentum:
        raise ConfigError(
            "optimizer.nesterov=True: there is no momentum; set optimizer.momentum above 0, or optimizer.nesterov=false"
        )
    learning_rate_factors(config)
    check_schedule(config.schedule, config.optimizer.learning_rate)


def learning_rate_factors(config: ConfigDict) -> dict[str, float]:
    """Returns `optimizer.learning_rate_factors` as {pattern: factor}, in order; of two equal patterns the first counts.

    Raises:
        ConfigError: an entry is not "PATTERN=FACTOR", or its factor is not above 0 and finite.
    """
    factors: dict[str, float] = {}
    for entry in config.optimizer.learning_rate_factors:
        pattern, _, text = entry.rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = 0.0
        factors.setdefault(pattern, factor)
        if not pattern or not SMALLEST <= factor <= LARGEST:
            key = "optimizer.learning_rate_factors"
            raise ConfigError(
                f"{key}={config.optimizer.learning_rate_factors}: must be {KEYS[key].expects}; to freeze a part, "
                "use optimizer.freeze"
            )
    return factors


def check_given(config: ConfigDict, given: Iterable[str]) -> None:
    """Checks that each key given on the command line has an effect; keys set in files may have none.

    Raises:
        ConfigError: a key has no effect; the message names its value and how to give it one.
    """
    for key in given:
        if why := without_effect(config, key):
            raise ConfigError(f"{key}={get_key(config, key)} has no effect: {why}")


def without_effect(config: ConfigDict, key: str) -> str | None:
    """Returns why a key has no effect in a configuration, and how to give it one; None if it has one."""
    effect = KEYS[key].effect if key in KEYS else None
    return effect[1] if effect and not effect[0](config) else None
