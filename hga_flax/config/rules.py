"""What every configuration key may hold, alone and together with the others; no JAX is loaded for it.

`RULES` has one line for each key of configs/base.py (a test compares them). What needs the network,
the devices or the data set is checked in config.py and training/experiment.py.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from hga_flax.config.schedule_rules import check_schedule
from hga_flax.errors import ConfigError, nearest

WHOLE = 2**31 - 1  # the largest whole number: steps and indices are int32 on the devices


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
        kind: bool, int, float or str; of the entries where `many`.
        low, high: the smallest and the largest value, for numbers.
        above: `low` itself is excluded.
        choices: the only values, for texts.
        many: a tuple of such values.
        empty: the tuple may be empty.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()
    many: bool = False
    empty: bool = False


def _whole(low: int, high: int = WHOLE) -> Rule:
    return Rule(int, low, high)


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    return Rule(float, low, high, above)


def _choice(*choices: str) -> Rule:
    return Rule(str, choices=choices)


TEXT, SWITCH = Rule(str), Rule(bool)
RULES = {
    "seed": _whole(0),
    "model.name": TEXT,
    "model.options": TEXT,
    "model.attention": TEXT,
    "model.attention_options": TEXT,
    "model.dtype": _choice("float32", "bfloat16"),
    "init.from": TEXT,
    "data.name": TEXT,
    "data.dir": TEXT,
    "data.fake": SWITCH,
    "data.fake_examples": _whole(1),
    "data.train_split": TEXT,
    "data.eval_split": TEXT,
    "data.image_size": _whole(1, 8192),
    "data.mean": Rule(float, 0, 1, many=True),
    "data.std": Rule(float, 0, 1, above=True, many=True),
    "data.augmentation": _choice("imagenet", "small", "none"),
    "data.flip": SWITCH,
    "data.alternating_flip": SWITCH,
    "data.rotation_degrees": _number(0, 180),
    "data.crop_padding": _whole(0, 8192),
    "data.random_erasing": _number(0, 1),
    "data.randaugment_ops": _whole(0, 16),
    "data.randaugment_magnitude": _number(0, 10),
    "data.mixup": _number(0, 100),
    "data.cutmix": _number(0, 100),
    "data.eval_crop_fraction": _number(0, 1, above=True),
    "data.num_threads": _whole(0, 1024),
    "data.num_workers": _whole(0, 1024),
    "data.cache_mb": _whole(0),
    "data.max_bad_images": _whole(0, 10**6),
    "training.epochs": _number(0, 10**6, above=True),
    "training.steps": _whole(0),
    "training.batch_size": _whole(1),
    "training.loss": _choice("cross_entropy", "binary_cross_entropy"),
    "training.label_smoothing": _number(0, 0.999),
    "training.accumulation_steps": _whole(1),
    "training.ema_decay": _number(0, 0.9999999),
    "training.freeze_batch_stats": SWITCH,
    "training.batch_norm_scope": _choice("global", "device"),
    "training.log_every_steps": _whole(1),
    "training.deterministic": SWITCH,
    "training.skip_nonfinite": _whole(0),
    "training.grace_seconds": _number(0, 86400, above=True),
    "training.lost_process_seconds": _number(1, 10**6),
    "training.compilation_cache": TEXT,
    "optimizer.name": _choice("sgd", "adamw", "lamb"),
    "optimizer.learning_rate": _number(0, above=True),
    "optimizer.momentum": _number(0, 0.99999),
    "optimizer.nesterov": SWITCH,
    "optimizer.b1": _number(0, 0.99999),
    "optimizer.b2": _number(0, 0.9999999),
    "optimizer.eps": _number(0, 1, above=True),
    "optimizer.weight_decay": _number(0),
    "optimizer.decay_norm_and_bias": SWITCH,
    "optimizer.clip_norm": _number(0),
    "optimizer.freeze": Rule(str, many=True, empty=True),
    "optimizer.learning_rate_factors": Rule(str, many=True, empty=True),
    "schedule.name": _choice("step", "cosine", "linear", "constant"),
    "schedule.decay_every_epochs": _number(0, 10**6, above=True),
    "schedule.decay_at_steps": Rule(int, 1, WHOLE, many=True, empty=True),
    "schedule.decay_factor": _number(0, 1, above=True),
    "schedule.end_learning_rate": _number(0),
    "schedule.warmup_epochs": _number(0, 10**6),
    "schedule.warmup_steps": _whole(0),
    "schedule.warmup_share": _number(0, 0.99),
    "schedule.warmup_shape": _choice("linear", "constant"),
    "schedule.warmup_learning_rate": _number(0),
    "evaluation.every_epochs": _number(0, 10**6, above=True),
    "evaluation.image_size": _whole(0, 8192),
    "evaluation.batch_size": _whole(0),
    "checkpoint.every_steps": _whole(0),
    "checkpoint.keep": _whole(1),
}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
ENTRIES = {
    "data.mean": "one number for all channels or one for each, of values in 0..1 (not 0..255)",
    "data.std": "one number for all channels or one for each; std above 0, of values in 0..1 (not 0..255)",
    "optimizer.freeze": "patterns of parameters' paths, such as ('stem*', 'stage[12]*')",
    "optimizer.learning_rate_factors": "texts 'PATTERN=FACTOR', such as ('classifier=10',), each factor above 0",
    "schedule.decay_at_steps": "positive whole numbers",
}

# Keys that are younger than some runs, which went by these values; each new key of configs/base.py goes here too.
LATER = {
    "data.alternating_flip": False,
    "data.num_workers": 0,
    "data.cache_mb": 1024,
    "data.max_bad_images": 100,
    "data.mixup": 0.0,
    "data.cutmix": 0.0,
    "data.random_erasing": 0.0,
    "training.lost_process_seconds": 100.0,
    "training.grace_seconds": 25.0,
    "training.skip_nonfinite": 0,
    "optimizer.clip_norm": 0.0,
    "data.randaugment_ops": 0,
    "data.randaugment_magnitude": 9.0,
    "training.loss": "cross_entropy",
    "training.accumulation_steps": 1,
    "training.ema_decay": 0.0,
    "training.freeze_batch_stats": False,
    "optimizer.name": "sgd",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "schedule.end_learning_rate": 0.0,
    "schedule.warmup_share": 0.0,
    "evaluation.image_size": 0,
    "init.from": "",
    "optimizer.freeze": (),
    "optimizer.learning_rate_factors": (),
}

# key: (does it change anything in this configuration?, what would make it).
Use = tuple[Callable[[ConfigDict], Any], str]
_WARMUP: Use = (
    lambda c: c.schedule.warmup_steps or c.schedule.warmup_epochs or c.schedule.warmup_share,
    "there is no warm-up; set schedule.warmup_steps, schedule.warmup_epochs or schedule.warmup_share too",
)
_SGD: Use = (lambda c: c.optimizer.name == "sgd", "only optimizer.name='sgd' has momentum; others have b1 and b2")
_ADAM: Use = (lambda c: c.optimizer.name != "sgd", "only optimizer.name='adamw' and 'lamb' have it")


def _augments(key: str, verb: str) -> Use:
    counts = lambda c: c.data.augmentation != "none" or not c.data[key]
    return counts, f"data.augmentation='none' {verb} no image; choose 'small' or 'imagenet'"


USES: dict[str, Use] = {
    "data.flip": _augments("flip", "mirrors"),
    "data.alternating_flip": _augments("alternating_flip", "mirrors"),
    "data.rotation_degrees": _augments("rotation_degrees", "rotates"),
    "data.randaugment_magnitude": (
        lambda c: c.data.randaugment_ops,
        "there is no RandAugment; set data.randaugment_ops too",
    ),
    "data.eval_crop_fraction": (
        lambda c: c.data.augmentation == "imagenet",
        "only data.augmentation='imagenet' crops images for evaluation",
    ),
    "data.cache_mb": (
        lambda c: (c.data.augmentation != "imagenet" and not c.data.num_workers) or not c.data.cache_mb,
        "images are kept in memory only with data.augmentation='small' or 'none' and data.num_workers=0",
    ),
    "data.num_threads": (
        lambda c: not c.data.num_workers,
        "data.num_workers stands in the threads' place; set it to 0 for threads",
    ),
    "training.epochs": (lambda c: not c.training.steps, "training.steps wins over it; set training.steps to 0"),
    "training.batch_norm_scope": (
        lambda c: not c.training.freeze_batch_stats,
        "training.freeze_batch_stats=true takes no batch statistics",
    ),
    "optimizer.momentum": _SGD,
    "optimizer.nesterov": _SGD,
    "optimizer.b1": _ADAM,
    "optimizer.b2": _ADAM,
    "optimizer.eps": _ADAM,
    "optimizer.decay_norm_and_bias": (
        lambda c: c.optimizer.weight_decay,
        "there is no weight decay; set optimizer.weight_decay too",
    ),
    "schedule.decay_every_epochs": (
        lambda c: c.schedule.name == "step" and not c.schedule.decay_at_steps,
        "only schedule.name='step' without schedule.decay_at_steps decays every so many epochs",
    ),
    "schedule.decay_factor": (lambda c: c.schedule.name == "step", "only schedule.name='step' decays by a factor"),
    "schedule.end_learning_rate": (
        lambda c: c.schedule.name in ("cosine", "linear"),
        "only schedule.name='cosine' and 'linear' end at it",
    ),
    "schedule.warmup_shape": _WARMUP,
    "schedule.warmup_learning_rate": _WARMUP,
}


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
    """Adds the keys that are younger than a run's configuration, with the values that it went by; returns it."""
    with config.unlocked():
        for key, value in LATER.items():
            group, _, name = key.partition(".")
            if group not in config:
                config[group] = ConfigDict()
            if isinstance(config[group], ConfigDict) and name not in config[group]:
                config[group][name] = value
    return config


def check_keys(config: ConfigDict) -> None:
    """Checks that a configuration has the known keys, each with a value of its type and range.

    Raises:
        ConfigError: names the key, its value and what would be right.
    """
    keys = config_keys(config)
    for key in keys:
        inside = [known for known in RULES if known.startswith(key + ".")]
        if inside:
            raise ConfigError(f"{key}={get_key(config, key)!r}: it is a group: {', '.join(inside)}")
        if key not in RULES:
            groups = [] if "." in key else {rule.split(".")[0]: None for rule in RULES}
            raise ConfigError(f"{key}: there is no such key{nearest(key, [*groups, *RULES])}")
    for key in RULES:
        if key not in keys:
            raise ConfigError(f"{key} is missing; begin a configuration with configs.base.get_config()")
    for key, rule in RULES.items():
        _check_value(key, rule, get_key(config, key))


def _check_value(key: str, rule: Rule, value: Any) -> None:
    if rule.many:
        right = isinstance(value, tuple | list) and all(_is_entry(rule, v) for v in value)
        if not right or (not value and not rule.empty):
            raise ConfigError(f"{key}={value}: {ENTRIES[key]}")
        return
    if not _is(rule.kind, value):
        raise ConfigError(f"{key}={value!r}: must be {KINDS[rule.kind]}")
    if rule.kind is str and not value.isprintable():
        raise ConfigError(f"{key}={value!r}: a text without line breaks and control characters")
    if rule.choices and value not in rule.choices:
        raise ConfigError(f"{key}='{value}'{nearest(value, rule.choices)}; choose from: {', '.join(rule.choices)}")
    if rule.kind in (int, float) and not _inside(rule, value):
        bound = "above" if rule.above else "at least"
        upper = f" and at most {rule.high}" if rule.high != math.inf else " and finite"
        raise ConfigError(f"{key}={value}: must be {bound} {rule.low}{upper}")


def _is_entry(rule: Rule, value: Any) -> bool:
    return _is(rule.kind, value) and (value.isprintable() if rule.kind is str else _inside(rule, value))


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool):  # which Python counts among the whole numbers
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _inside(rule: Rule, value: float) -> bool:
    return (rule.low < value or (value == rule.low and not rule.above)) and value <= min(rule.high, sys.float_info.max)


def check_together(config: ConfigDict) -> None:
    """Checks the values of a configuration that passes `check_keys` against each other.

    Raises:
        ConfigError: names the key, its value and what would be right.
    """
    data = config.data
    if data.augmentation != "small" and data.crop_padding:
        raise ConfigError(
            f"data.crop_padding={data.crop_padding}: only data.augmentation='small' pads and crops; "
            "choose that, or 0 here"
        )
    if data.crop_padding >= data.image_size:
        raise ConfigError(
            f"data.crop_padding={data.crop_padding}: a crop of data.image_size={data.image_size} could miss the "
            f"image; at most {data.image_size - 1}"
        )
    if data.alternating_flip and not data.flip:
        raise ConfigError(
            "data.alternating_flip=True: data.flip=False mirrors no image; set data.flip to true, or false here"
        )
    if len({len(data.mean), len(data.std)} | {1}) > 2:
        raise ConfigError(f"data.std={data.std}: data.mean has {len(data.mean)} entries; give as many here, or one")
    for key in ("name", "train_split", "eval_split"):
        if not data[key].strip():
            raise ConfigError(f"data.{key}='': name a {'data set' if key == 'name' else 'split'}")
    if data.augmentation == "none" and data.randaugment_ops:
        raise ConfigError(
            f"data.randaugment_ops={data.randaugment_ops}: data.augmentation='none' changes no image; choose 'small' "
            "or 'imagenet', or 0 here"
        )
    if config.optimizer.name == "sgd" and config.optimizer.nesterov and not config.optimizer.momentum:
        raise ConfigError(
            "optimizer.nesterov=True: there is no momentum; set optimizer.momentum above 0, or false here"
        )
    learning_rate_factors(config)
    check_schedule(config.schedule, config.optimizer.learning_rate)


def learning_rate_factors(config: ConfigDict) -> dict[str, float]:
    """Returns the factors of `optimizer.learning_rate_factors` by their patterns, in order.

    Raises:
        ConfigError: an entry is not "PATTERN=FACTOR", or its factor is not above 0 and finite.
    """
    factors = {}
    for entry in config.optimizer.learning_rate_factors:
        pattern, _, text = entry.rpartition("=")
        try:
            factors[pattern] = float(text)
        except ValueError:
            factors[pattern] = 0.0
        if not pattern or not 0 < factors[pattern] <= sys.float_info.max:
            key = "optimizer.learning_rate_factors"
            raise ConfigError(
                f"{key}={config.optimizer.learning_rate_factors}: {ENTRIES[key]}; to hold a part still, "
                "optimizer.freeze"
            )
    return factors


def check_given(config: ConfigDict, given: Iterable[str]) -> None:
    """Checks that the keys given on the command line change something; those of files may lie idle.

    Raises:
        ConfigError: names the key, its value and what would make it count.
    """
    for key in given:
        changes, reason = USES.get(key, (lambda config: True, ""))
        if not changes(config):
            raise ConfigError(f"{key}={get_key(config, key)}: changes nothing here: {reason}")
