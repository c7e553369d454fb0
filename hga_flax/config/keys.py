"""The table of configuration keys: the values each accepts, when it has an effect, and its value in older runs.

Defaults and explanations are in configs/base.py, where users read them; a test compares the two.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

WHOLE = 2**31 - 1  # the largest integer: steps and indices are int32 on the devices
ALWAYS = object()  # `Key.before` of keys that every run has


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a key accepts.

    Attributes:
        kind: type of the value, or of each entry if `many`: bool, int, float or str.
        low, high: smallest and largest number allowed.
        above: whether `low` itself is excluded.
        choices: the only strings allowed; empty: any.
        many: whether the value is a tuple.
        empty: whether the tuple may be empty.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()
    many: bool = False
    empty: bool = False


def whole(low: int, high: int = WHOLE) -> Rule:
    return Rule(int, low, high)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    return Rule(float, low, high, above)


def choice(*choices: str) -> Rule:
    return Rule(str, choices=choices)


# (function that returns whether the key has an effect in a configuration, what to do if it has none).
Effect = tuple[Callable[[ConfigDict], Any], str]
WARMUP: Effect = (
    lambda c: c.schedule.warmup_steps or c.schedule.warmup_epochs or c.schedule.warmup_share,
    "there is no warm-up; set schedule.warmup_steps, schedule.warmup_epochs or schedule.warmup_share too",
)
SGD: Effect = (lambda c: c.optimizer.name == "sgd", "only optimizer.name='sgd' has momentum; the others have b1 and b2")
ADAM: Effect = (lambda c: c.optimizer.name != "sgd", "only optimizer.name='adamw' and 'lamb' use it")
REAL: Effect = (lambda c: not c.data.fake, "data.fake=true makes synthetic images")


def augments(key: str, verb: str) -> Effect:
    counts = lambda c: c.data.augmentation != "none" or not c.data[key]
    return counts, f"data.augmentation='none' {verb} no image; choose 'small' or 'imagenet'"


@dataclasses.dataclass(frozen=True)
class Key:
    """A configuration key.

    Attributes:
        rule: the values that the key accepts.
        before: the value that reproduces runs made before the key existed; `ALWAYS` if every run has the key.
            A new key needs one, so that older workdirs stay readable.
        expects: for a tuple, the end of the error message "must be ...".
        effect: whether the key has an effect in a configuration, see `Effect`; None: it always has one.
    """

    rule: Rule
    before: Any = ALWAYS
    expects: str = ""
    effect: Effect | None = None


TEXT, SWITCH = Rule(str), Rule(bool)
KEYS = {
    "seed": Key(whole(0)),
    "model.name": Key(TEXT),
    "model.options": Key(TEXT),
    "model.attention": Key(TEXT),
    "model.attention_options": Key(TEXT),
    "model.dtype": Key(choice("float32", "bfloat16")),
    "init.weights": Key(TEXT, before=""),
    "data.name": Key(TEXT),
    "data.dir": Key(TEXT),
    "data.fake": Key(SWITCH),
    "data.fake_examples": Key(whole(1), effect=(lambda c: c.data.fake, "only data.fake=true has synthetic images")),
    "data.train_split": Key(TEXT, effect=REAL),
    "data.eval_split": Key(TEXT, effect=REAL),
    "data.image_size": Key(whole(1, 8192)),
    "data.mean": Key(
        Rule(float, 0, 1, many=True),
        expects="one number for all channels or one for each, for pixel values in 0..1 (not 0..255)",
    ),
    "data.std": Key(
        Rule(float, 0, 1, above=True, many=True),
        expects="one number above 0 for all channels or one for each, for pixel values in 0..1 (not 0..255)",
    ),
    "data.augmentation": Key(choice("imagenet", "small", "none")),
    "data.flip": Key(SWITCH, effect=augments("flip", "mirrors")),
    "data.alternating_flip": Key(SWITCH, before=False, effect=augments("alternating_flip", "mirrors")),
    "data.rotation_degrees": Key(number(0, 180), effect=augments("rotation_degrees", "rotates")),
    "data.crop_padding": Key(whole(0, 8192)),
    "data.random_erasing": Key(number(0, 1), before=0.0),
    "data.randaugment_ops": Key(whole(0, 16), before=0),
    "data.randaugment_magnitude": Key(
        number(0, 10),
        before=9.0,
        effect=(
            lambda c: c.data.randaugment_ops,
            "there is no RandAugment; set data.randaugment_ops too",
        ),
    ),
    "data.mixup": Key(number(0, 100), before=0.0),
    "data.cutmix": Key(number(0, 100), before=0.0),
    "data.eval_crop_fraction": Key(
        number(0, 1, above=True),
        effect=(
            lambda c: c.data.augmentation == "imagenet",
            "only data.augmentation='imagenet' crops images for evaluation",
        ),
    ),
    "data.num_threads": Key(
        whole(0, 1024),
        effect=(
            lambda c: not c.data.num_workers,
            "data.num_workers reads with processes instead of threads; set it to 0 to use threads",
        ),
    ),
    "data.num_workers": Key(whole(0, 1024), before=0),
    "data.cache_mb": Key(
        whole(0),
        before=1024,
        effect=(
            lambda c: (c.data.augmentation != "imagenet" and not c.data.num_workers) or not c.data.cache_mb,
            "images are kept in memory only with data.augmentation='small' or 'none' and data.num_workers=0",
        ),
    ),
    "data.max_bad_images": Key(whole(0, 10**6), before=100, effect=REAL),
    "training.epochs": Key(
        number(0, 10**6, above=True),
        effect=(lambda c: not c.training.steps, "training.steps takes precedence; set training.steps to 0"),
    ),
    "training.steps": Key(whole(0)),
    "training.batch_size": Key(whole(1)),
    "training.loss": Key(choice("cross_entropy", "binary_cross_entropy"), before="cross_entropy"),
    "training.label_smoothing": Key(number(0, 0.999)),
    "training.accumulation_steps": Key(whole(1), before=1),
    "training.ema_decay": Key(number(0, 0.9999999), before=0.0),
    "training.freeze_batch_stats": Key(SWITCH, before=False),
    "training.batch_norm_scope": Key(
        choice("global", "device"),
        effect=(
            lambda c: not c.training.freeze_batch_stats,
            "training.freeze_batch_stats=true uses no batch statistics",
        ),
    ),
    "training.log_every_steps": Key(whole(1)),
    "training.cpu_devices": Key(whole(0, 1024), before=0),
    "training.deterministic": Key(SWITCH),
    "training.skip_nonfinite": Key(whole(0), before=0),
    "training.grace_seconds": Key(number(0, 86400, above=True), before=25.0),
    "training.lost_process_seconds": Key(number(1, 10**6), before=100.0),
    "training.compilation_cache": Key(TEXT),
    "optimizer.name": Key(choice("sgd", "adamw", "lamb"), before="sgd"),
    "optimizer.learning_rate": Key(number(0, above=True)),
    "optimizer.momentum": Key(number(0, 0.99999), effect=SGD),
    "optimizer.nesterov": Key(SWITCH, effect=SGD),
    "optimizer.b1": Key(number(0, 0.99999), before=0.9, effect=ADAM),
    "optimizer.b2": Key(number(0, 0.9999999), before=0.999, effect=ADAM),
    "optimizer.eps": Key(number(0, 1, above=True), before=1e-8, effect=ADAM),
    "optimizer.weight_decay": Key(number(0)),
    "optimizer.decay_norm_and_bias": Key(
        SWITCH,
        effect=(
            lambda c: c.optimizer.weight_decay or c.optimizer.name == "lamb",  # whose scaling leaves them out too
            "there is no weight decay; set optimizer.weight_decay too",
        ),
    ),
    "optimizer.clip_norm": Key(number(0), before=0.0),
    "optimizer.freeze": Key(
        Rule(str, many=True, empty=True),
        before=(),
        expects="patterns of parameters' paths, such as ('stem*', 'stage[12]*')",
    ),
    "optimizer.learning_rate_factors": Key(
        Rule(str, many=True, empty=True),
        before=(),
        expects="strings 'PATTERN=FACTOR', such as ('classifier=10',), each factor above 0",
    ),
    "schedule.name": Key(choice("step", "cosine", "linear", "constant")),
    "schedule.decay_every_epochs": Key(
        number(0, 10**6, above=True),
        effect=(
            lambda c: c.schedule.name == "step" and not c.schedule.decay_at_steps,
            "only schedule.name='step' without schedule.decay_at_steps uses it",
        ),
    ),
    "schedule.decay_at_steps": Key(Rule(int, 1, WHOLE, many=True, empty=True), expects="positive whole numbers"),
    "schedule.decay_factor": Key(
        number(0, 1, above=True),
        effect=(lambda c: c.schedule.name == "step", "only schedule.name='step' decays by a factor"),
    ),
    "schedule.end_learning_rate": Key(
        number(0),
        before=0.0,
        effect=(
            lambda c: c.schedule.name in ("cosine", "linear"),
            "only schedule.name='cosine' and 'linear' use it",
        ),
    ),
    "schedule.warmup_epochs": Key(number(0, 10**6)),
    "schedule.warmup_steps": Key(whole(0)),
    "schedule.warmup_share": Key(number(0, 0.99), before=0.0),
    "schedule.warmup_shape": Key(choice("linear", "constant"), effect=WARMUP),
    "schedule.warmup_learning_rate": Key(number(0), effect=WARMUP),
    "evaluation.every_epochs": Key(number(0, 10**6, above=True)),
    "evaluation.image_size": Key(whole(0, 8192), before=0),
    "evaluation.batch_size": Key(whole(0)),
    "checkpoint.every_steps": Key(whole(0)),
    "checkpoint.keep": Key(whole(1)),
}
FORMER_NAMES = {"init.from": "init.weights"}  # still accepted in flags and in the workdirs of older runs
