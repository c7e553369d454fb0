"""Random overrides of every key: either one clear line, or a run that trains."""

import os
import tempfile

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hga_flax.config.keys import KEYS as TABLE
from hga_flax.config.loading import configure, validate
from hga_flax.data.sources import dataset_info
from hga_flax.errors import UserError, one_line
from hga_flax.training.experiment import create_experiment, prepare
from hga_flax.training.trainer import train

BASE = (
    "model.name=cifar_resnet8",
    "model.options=features=4",
    "data.fake=true",
    "data.fake_examples=48",
    "data.image_size=8",
    "data.num_threads=0",
    "training.batch_size=16",
    "training.steps=1",
    "training.compilation_cache=" + os.environ["JAX_COMPILATION_CACHE_DIR"],
)
# Values that are right by themselves. None makes the network or the run larger than a test can bear.
RIGHT = {
    "seed": ["0", "7", "2147483647"],
    "model.name": ["cifar_resnet8", "cifar_preact_resnet8", "cifar_resnet11_bottleneck", "cifar_wide_resnet10_1"],
    "model.options": [
        "features=4",
        "features=8, dropout=0.1",
        "features=4, stochastic_depth=0.5",
        "shortcut='A'",
        "widen=2, features=2",
        "",
    ],
    "model.attention": ["none", "hga", "hga_table2", "se", "sk", "eca", "cbam", "gc", "ge", "nl"],
    "model.attention_options": ["", "kernels=(3,)", "ratio=2", "mfe_act='relu'", "excitation='concat'", "bins=(9,)"],
    "model.dtype": ["float32", "bfloat16"],
    "init.weights": [""],  # tests/training/test_initial_weights.py
    "data.name": ["digits"],
    "data.dir": [""],
    "data.fake": ["true", "false"],
    "data.fake_examples": ["16", "17", "48"],
    "data.train_split": ["train", "train[:10%]", "test", "all", "train[:20]+test[-20:]"],
    "data.eval_split": ["test", "train[:17]"],
    "data.image_size": ["4", "7", "8", "9"],
    "data.mean": ["0.5", "(0.5,)", "0"],
    "data.std": ["0.25", "1", "(0.001,)"],
    "data.augmentation": ["imagenet", "small", "none"],
    "data.flip": ["true", "false"],
    "data.alternating_flip": ["true", "false"],
    "data.rotation_degrees": ["0", "10", "180"],
    "data.crop_padding": ["0", "1", "7"],
    "data.random_erasing": ["0", "0.5", "1"],
    "data.randaugment_ops": ["0", "2", "16"],
    "data.randaugment_magnitude": ["0", "7.5", "10"],
    "data.mixup": ["0", "0.2", "100"],
    "data.cutmix": ["0", "1"],
    "data.eval_crop_fraction": ["0.01", "0.875", "1"],
    "data.num_threads": ["0", "2"],
    "data.num_workers": ["0"],  # processes take seconds to start
    "data.cache_mb": ["0", "10"],
    "data.max_bad_images": ["0", "10"],
    "training.epochs": ["0.01", "0.34"],
    "training.steps": ["0", "1", "2"],
    "training.batch_size": ["8", "16", "48"],
    "training.label_smoothing": ["0", "0.1", "0.999"],
    "training.loss": ["cross_entropy", "binary_cross_entropy"],
    "training.accumulation_steps": ["1", "2", "4"],
    "training.ema_decay": ["0", "0.9", "0.9999999"],
    "training.freeze_batch_stats": ["true", "false"],
    "training.batch_norm_scope": ["global", "device"],
    "training.skip_nonfinite": ["0", "3"],
    "training.grace_seconds": ["0.1", "25"],
    "training.lost_process_seconds": ["1", "100"],
    "training.log_every_steps": ["1", "1000"],
    "training.cpu_devices": ["0", "8"],  # tests have 8
    "training.deterministic": ["true", "false"],
    "training.compilation_cache": [os.environ["JAX_COMPILATION_CACHE_DIR"]],
    "optimizer.name": ["sgd", "adamw", "lamb"],
    "optimizer.b1": ["0", "0.9"],
    "optimizer.b2": ["0", "0.95", "0.9999999"],
    "optimizer.eps": ["1e-30", "1e-8", "1"],
    "optimizer.learning_rate": ["0.1", "1e-30", "1e30"],
    "optimizer.momentum": ["0", "0.9"],
    "optimizer.nesterov": ["true", "false"],
    "optimizer.weight_decay": ["0", "1e-4", "1e30"],
    "optimizer.decay_norm_and_bias": ["true", "false"],
    "optimizer.clip_norm": ["0", "1e-30", "1", "1e30"],
    "optimizer.freeze": ["()", "stem*", "stage[12]*,classifier", "*/attention"],
    "optimizer.learning_rate_factors": ["()", "classifier=10", "stem*=0.1,*=2"],
    "schedule.name": ["step", "cosine", "linear", "constant"],
    "schedule.decay_every_epochs": ["0.5", "30", "1000000"],
    "schedule.decay_at_steps": ["()", "1", "(1, 2)"],
    "schedule.decay_factor": ["0.1", "1", "1e-300"],
    "schedule.end_learning_rate": ["0", "1e-6", "1"],
    "schedule.warmup_epochs": ["0", "0.1", "1000000"],
    "schedule.warmup_steps": ["0", "1", "2147483647"],
    "schedule.warmup_share": ["0", "0.1", "0.99"],
    "schedule.warmup_shape": ["linear", "constant"],
    "schedule.warmup_learning_rate": ["0", "0.01", "1e300"],
    "evaluation.every_epochs": ["0.1", "1", "1000000"],
    "evaluation.image_size": ["0", "4", "9"],
    "evaluation.batch_size": ["0", "8", "64"],
    "checkpoint.every_steps": ["0", "1", "1000"],
    "checkpoint.keep": ["1", "2", "2147483647"],
}
WRONG = ["", " ", "-1", "0", "1.5", "nan", "inf", "-inf", "None", "True", "1e400", "9" * 30, "(", "()", "(1,'a')", "[]",
         "a=1", "x", "__import__('os').system('false')", "\\", "'", '"', "é", "~", "..", "/dev/null/x", "a\nb", "{}",
         "kernels=(2,)", "dropout=2", "features='x'", "features=0", "train[:0]", "traim", "train[",
         "folder"]  # fmt: skip
KEYS = sorted(TABLE)
# Where a wrong value of one key would be a right one that takes too long or too much memory.
RISKY = {"data.image_size", "evaluation.image_size", "training.steps", "training.batch_size", "data.fake_examples"}


@st.composite
def overrides(draw):
    """Up to five `key=value`, most of them right by themselves."""
    chosen = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True))
    given = []
    for key in chosen:
        wrong = draw(st.integers(0, 9)) == 0
        text = st.text(max_size=12) if draw(st.booleans()) and key not in RISKY else st.sampled_from(WRONG)
        given.append(f"{key}={draw(text if wrong else st.sampled_from(RIGHT[key]))}")
    return tuple(given)


def check(given, trains=True):
    """Trains as configured in a workdir of its own, or only builds what a run needs; a refusal must be one line."""
    real = "data.fake=false" in given  # which the number of synthetic images would be refused beside
    base = [override for override in BASE if not (real and override.startswith("data.fake_examples="))]
    with tempfile.TemporaryDirectory() as workdir:
        try:
            config = validate(configure("configs/digits.py", [f"--config.{override}" for override in (*base, *given)]))
            if trains:
                train(config, workdir)
            else:
                prepare(create_experiment(config, lambda: dataset_info(config.data.name, config.data.dir)))
        except UserError as error:
            assert one_line(error) == str(error).strip() and len(str(error)) > 20, repr(str(error))


def test_every_key_takes_part():
    assert sorted(RIGHT) == KEYS


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=2, derandomize=True, **QUIET)
@given(overrides())
@pytest.mark.slow
def test_random_overrides_are_refused_in_one_line_or_train(given):
    check(given)


@pytest.mark.slow
@settings(max_examples=250, **QUIET)
@given(overrides(), st.integers(0, 7))
def test_many_random_overrides_are_refused_in_one_line_or_train(given, eighth):
    """Nearly all of the time goes into compiling: one in eight trains, every one is built and traced."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        check(given, trains=not eighth)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.medium
@pytest.mark.parametrize("key", KEYS)
def test_each_wrong_value_of_each_key_is_refused_in_one_line_or_passes_the_checks(key):
    for value in WRONG:
        try:
            validate(configure("configs/digits.py", [f"--config.{key}={value}"]))
        except UserError as error:
            assert one_line(error) == str(error).strip(), (key, value)
