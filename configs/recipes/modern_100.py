"""A fast modern recipe of 100 epochs: A3 of ResNet strikes back, trained at 160 pixels, evaluated at 224.

    python train.py --config=FILE --recipe=modern-100 --workdir=DIR

Wightman, Touvron, Jegou, https://arxiv.org/abs/2110.00476, table 2, A3: like A2 (modern_300.py, which
also lists the differences here), but with 160 pixels in training, LAMB at 0.008, RandAugment of
magnitude 6 and no stochastic depth. They report 78.1 % top-1 for a plain ResNet-50.
Not run on ImageNet with this code.
"""

import math

from configs.recipes import crops, modern_300


def apply(config):
    options = config.model.options
    modern_300.apply(config)
    config.model.options = options
    if crops(config):
        config.data.image_size, config.evaluation.image_size = 160, 224
    config.data.randaugment_magnitude = 6.0
    config.training.epochs = 100.0
    config.optimizer.learning_rate = 0.008 * math.sqrt(config.training.batch_size / 2048)
