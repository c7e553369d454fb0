"""Recipes: how to train, separate from what to train. Each file's `apply(config)` changes a configuration in place.

python train.py --config=configs/hga_resnet50.py --recipe=modern-100 --workdir=DIR

Each recipe begins with `reset`, which undoes the training settings of the configuration file. The rest stays: the
network with its options, the initial weights, the data set, its splits, sizes and normalisation, the kind of
augmentation with its flips and padding, logging, checkpoints. Flags override a recipe. The result is in the workdir's
config.json.
"""

from configs import base

# The keys that say how to train. The other keys of "training" say where, how often and how safely.
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
    """Sets every key that `HOW` lists to its value in configs/base.py."""
    plain = base.get_config()
    for group, names in HOW.items():
        for name in names or plain[group]:
            config[group][name] = plain[group][name]


def crops(config):
    """Returns whether images are cropped at random, as on ImageNet; if not, recipes keep the image and batch size."""
    return config.data.augmentation == "imagenet"


def add_stochastic_depth(config, rate):
    """Adds stochastic depth with this rate to the options of a network that supports it."""
    from hga_flax.models import model_options

    try:
        supported = "stochastic_depth" in model_options(config.model.name)
    except ValueError:  # there is no such network; training says so
        supported = False
    options = config.model.options
    if supported and "stochastic_depth" not in options:
        config.model.options = f"{options}, stochastic_depth={rate}" if options.strip() else f"stochastic_depth={rate}"
