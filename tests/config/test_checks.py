"""Every kind of bad configuration with the one line that the user sees."""

import os
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import base
from hga_flax.config import checks as v
from hga_flax.config.keys import ALWAYS, KEYS
from hga_flax.config.loading import configure, validate
from hga_flax.data.sources import dataset_info
from hga_flax.errors import ConfigError, UserError, one_line
from hga_flax.training.experiment import create_experiment, prepare

LATER = {key: entry.before for key, entry in KEYS.items() if entry.before is not ALWAYS}
# A small network on the digits, which divides evenly over the eight devices.
SMALL = (
    "model.name=cifar_resnet8",
    "data.image_size=8",
    "training.batch_size=32",
    "training.compilation_cache=" + os.environ["JAX_COMPILATION_CACHE_DIR"],
)


def check(overrides, file="configs/digits.py"):
    """All checks of a training run, in their order; nothing is compiled and no image read."""
    config = validate(configure(file, [f"--config.{override}" for override in (*SMALL, *overrides)]))
    return prepare(create_experiment(config, lambda: dataset_info(config.data.name, config.data.dir)))


def test_the_base_of_the_table_is_right():
    assert check([]).plan.total_steps == 1125


# Pairs of lines: overrides with ";" between them, and what the user sees after "error: ".
TABLE = (pathlib.Path(__file__).parent / "bad_configurations.txt").read_text().splitlines()
BAD = {overrides: line.strip() for overrides, line in zip(TABLE[::2], TABLE[1::2], strict=True)}


def test_the_table_is_long_enough():
    assert len(BAD) >= 40


@pytest.mark.parametrize("overrides", BAD)
def test_a_bad_configuration_is_one_line_that_names_the_key(overrides):
    with pytest.raises(UserError) as caught:
        check(overrides.split(";"))
    assert str(caught.value) == BAD[overrides] == one_line(caught.value)
    assert any(key in str(caught.value) for key in (*KEYS, "optimzer", "optimizer", "config.model", "the folder"))


MODEL = [key for key in KEYS if key.startswith("model.")]


def changed(**values):
    """The base configuration with values that a file may set and a command line may not."""
    config = base.get_config().to_dict()
    for key, value in values.items():
        group, name = key.split("__") if "__" in key else (None, key)
        (config[group] if group else config)[name] = value
    return ConfigDict(config)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"seed": True}, "seed=True: must be a whole number"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"seed": 1.0}, "seed=1.0: must be a whole number"),
        ({"data__fake": 1}, "data.fake=1: must be True or False"),
        ({"data__fake": "yes"}, "data.fake='yes': must be True or False"),
        ({"optimizer__learning_rate": "0.1"}, "optimizer.learning_rate='0.1': must be a number"),
        ({"optimizer__learning_rate": True}, "optimizer.learning_rate=True: must be a number"),
        (
            {"optimizer__learning_rate": 1e-50},
            "optimizer.learning_rate=1e-50: is too small, the devices take it for 0; give at least 1.2e-38",
        ),
        (
            {"data__mixup": 1.1e-38},
            "data.mixup=1.1e-38: is too small, the devices take it for 0; give 0 or at least 1.2e-38",
        ),
        (
            {"data__mean": (0.5, 1e-50)},
            "data.mean=(0.5, 1e-50): is too small, the devices take it for 0; give 0 or at least 1.2e-38",
        ),
        ({"model__name": 1e-50}, "model.name=1e-50: must be a string"),
        ({"optimizer__learning_rate": 10**400}, f"optimizer.learning_rate={10**400}: must be above 0 and finite"),
        ({"model__name": 50}, "model.name=50: must be a string"),
        ({"data__dir": "a\0b"}, "data.dir='a\\x00b': must be a string without line breaks or control characters"),
        ({"data__mean": 0.5}, f"data.mean=0.5: must be {KEYS['data.mean'].expects}"),
        ({"data__mean": (True,)}, f"data.mean=(True,): must be {KEYS['data.mean'].expects}"),
        ({"data__mean": ()}, f"data.mean=(): must be {KEYS['data.mean'].expects}"),
        ({"data__std": (float("inf"),)}, f"data.std=(inf,): must be {KEYS['data.std'].expects}"),
        ({"schedule__decay_at_steps": (1.5,)}, "schedule.decay_at_steps=(1.5,): must be positive whole numbers"),
        ({"optimizer__freeze": "stem*"}, f"optimizer.freeze=stem*: must be {KEYS['optimizer.freeze'].expects}"),
        ({"optimizer__freeze": (1,)}, f"optimizer.freeze=(1,): must be {KEYS['optimizer.freeze'].expects}"),
        ({"optimzer": 1}, "optimzer: there is no such key; did you mean 'optimizer'?"),
        ({"model": "resnet50"}, f"model='resnet50': it is a group: {', '.join(MODEL)}"),
        ({"optimizer__momentun": 0.9}, "optimizer.momentun: there is no such key; did you mean 'optimizer.momentum'?"),
    ],
)
def test_a_wrong_type_in_a_file_is_one_line_that_names_the_key(values, line):
    with pytest.raises(ConfigError) as caught:
        v.check_keys(changed(**values))
    assert str(caught.value) == line


def test_a_missing_key_is_named():
    config = base.get_config()
    with config.unlocked():
        del config.data["mixup"]
    with pytest.raises(ConfigError, match=r"^data\.mixup is missing; begin a configuration with configs\.base"):
        v.check_keys(config)


def test_a_configuration_of_before_a_key_is_completed_with_what_its_run_went_by():
    whole = base.get_config()
    old = whole.to_dict()
    for key, value in LATER.items():
        assert v.get_key(whole, key) == value and type(v.get_key(whole, key)) is type(value), key
        group, name = key.split(".")
        del old[group][name]
        if not old[group]:
            del old[group]
    assert v.complete(ConfigDict(old).lock()) == whole
    v.check_keys(v.complete(whole))


def test_a_list_is_as_good_as_a_tuple():
    v.check_keys(changed(data__mean=[0.5], schedule__decay_at_steps=[3, 4]))


# What makes each key of `KEYS` with an effect count; it is refused in `BAD`, or here, where it does nothing.
@pytest.mark.parametrize(
    ("key", "idle", "used"),
    [
        ("data.flip=true", ["data.augmentation=none", "data.crop_padding=0"], []),
        (
            "data.alternating_flip=true",
            ["data.augmentation=none", "data.crop_padding=0", "data.flip=true"],
            ["data.flip=true"],
        ),
        ("data.rotation_degrees=5", ["data.augmentation=none", "data.crop_padding=0"], []),
        ("data.eval_crop_fraction=0.9", [], ["data.augmentation=imagenet", "data.crop_padding=0"]),
        ("data.cache_mb=5", ["data.num_workers=1"], []),
        ("data.num_threads=1", ["data.num_workers=1"], []),
        ("training.epochs=2", ["training.steps=3"], []),
        ("data.randaugment_magnitude=3", [], ["data.randaugment_ops=1"]),
        ("training.batch_norm_scope=device", ["training.freeze_batch_stats=true"], []),
        ("optimizer.momentum=0.5", ["optimizer.name=lamb"], []),
        ("optimizer.nesterov=true", ["optimizer.name=adamw"], []),
        ("optimizer.b1=0.5", [], ["optimizer.name=adamw"]),
        ("optimizer.b2=0.5", [], ["optimizer.name=lamb"]),
        ("optimizer.eps=0.1", [], ["optimizer.name=lamb"]),
        ("schedule.end_learning_rate=0.01", ["schedule.name=constant"], []),
        ("optimizer.decay_norm_and_bias=false", ["optimizer.weight_decay=0"], []),
        (
            "optimizer.decay_norm_and_bias=false",
            ["optimizer.weight_decay=0", "optimizer.name=adamw"],
            ["optimizer.weight_decay=0", "optimizer.name=lamb"],
        ),
        ("data.fake_examples=64", [], ["data.fake=true"]),
        ("schedule.decay_every_epochs=3", [], ["schedule.name=step"]),
        ("schedule.decay_factor=0.2", [], ["schedule.name=step"]),
        ("schedule.warmup_shape=linear", [], ["schedule.warmup_steps=3"]),
        ("schedule.warmup_learning_rate=0.01", [], ["schedule.warmup_epochs=3"]),
        (
            "schedule.warmup_shape=constant",
            ["schedule.warmup_learning_rate=0.01"],
            ["schedule.warmup_share=0.1", "schedule.warmup_learning_rate=0.01"],
        ),
    ],
)
def test_a_key_given_by_hand_must_change_something(key, idle, used):
    name = key.split("=")[0]
    assert KEYS[name].effect
    with pytest.raises(ConfigError, match=f"^{name}=.* has no effect: "):
        configure("configs/digits.py", [f"--config.{o}" for o in (*SMALL, key, *idle)])
    configure("configs/digits.py", [f"--config.{o}" for o in (*SMALL, key, *used)])


def test_a_file_may_leave_keys_idle():
    validate(configure("configs/hga_resnet50.py", ["--config.schedule.name=cosine"]))
