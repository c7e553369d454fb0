"""The names of ImageNet's 1,000 classes, in the order of their labels, which is that of their WordNet numbers.

From torchvision (torchvision/models/_meta.py, BSD 3-clause licence). Released weights use the same order.
"""

import functools
import importlib.resources


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Returns the names by label: "tench", "goldfish", ... "toilet tissue".

    Examples:
        >>> imagenet_classes()[281]
        'tabby'
    """
    text = importlib.resources.files("hga_flax.data").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
