"""Recipes: how to train, apart from what. `apply(config)` of each file changes a configuration's keys in place.

python train.py --config=configs/hga_resnet50.py --recipe=modern-100 --workdir=DIR

Each recipe begins with `reset`, which undoes how another file trains; what it trains, on what data and on which
machine stays: the network with its options, the initial weights, the data set, its splits, sizes and normalisation,
the kind of augmentation with its flips and padding, logging, checkpoints. Any key can still be overridden by hand, and
wins. What comes out is in the workdir's config.json.
"""

from configs import base

# How to train. Of the group "training" the other keys say where, how often and how safely.
HOW = {
    "data": (
        "alternating_flip", "rotation_degrees", "random_erasing", "randaugment_ops", "randaugment_magnitude", "mixup",
        "cutmix",
    ),
    "training": (
        "epochs", "steps", "loss", "label_smoothing", "accumulation_steps", "ema_decay", "freeze_batch_stats",
        "batch_norm_scope",
    ),
    "optimizer": None,  # all keys
    "schedule": None,
}  # fmt: skip


def reset(config):
    """Sets all that `HOW` names to the values of configs/base.py."""
    plain = base.get_config()
    for group, names in HOW.items():
        for name in names or plain[group]:
            config[group][name] = plain[group][name]


def crops(config):
    """True for data like ImageNet's, cut to size at random; small images keep their size and their batch."""
    return config.data.augmentation == "imagenet"


def add_stochastic_depth(config, rate):
    """Adds it to the options of the networks that have it."""
    options = config.model.options
    if "resne" in config.model.name and "stochastic_depth" not in options:
        config.model.options = f"{options}, stochastic_depth={rate}" if options.strip() else f"stochastic_depth={rate}"
