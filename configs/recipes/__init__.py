"""Recipes: how to train, apart from what. `apply(config)` of each file changes a configuration's keys in place.

python train.py --config=configs/hga_resnet50.py --recipe=modern-100 --workdir=DIR

Any key can still be overridden by hand, and wins. What comes out is in the workdir's config.json.
"""


def crops(config):
    """True for data like ImageNet's, cut to size at random; small images keep their size and their batch."""
    return config.data.augmentation == "imagenet"


def add_stochastic_depth(config, rate):
    """Adds it to the options of the networks that have it."""
    options = config.model.options
    if "resne" in config.model.name and "stochastic_depth" not in options:
        config.model.options = f"{options}, stochastic_depth={rate}" if options.strip() else f"stochastic_depth={rate}"
