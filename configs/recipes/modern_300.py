"""A modern recipe of 300 epochs, for more accuracy: A2 of ResNet strikes back.

    python train.py --config=FILE --recipe=modern-300 --workdir=DIR

Wightman, Touvron, Jegou, https://arxiv.org/abs/2110.00476, table 2, A2: LAMB at 0.005 with a batch
of 2048, weight decay 0.02 except on norms and biases, cosine after 5 epochs of warm-up, binary
cross-entropy, mixup 0.1, CutMix 1, RandAugment of magnitude 7, stochastic depth 0.05, evaluation of
the centre 95 %. They report 79.8 % top-1 for a plain ResNet-50. Their LAMB clips the gradient at 1.

Differences here: no repeated augmentation (theirs puts each image three times in a batch), mixed
labels stay soft (theirs become 1 above 0.2), the rate warms up from 1e-4 and ends at 1e-6, the
geometric operations of RandAugment share one warp, and a moving average of the weights, which they
do not keep, is evaluated (evaluate.py --weights=raw evaluates the weights themselves).

Data that are not cropped keep their image and batch size, and the rate is scaled by the square root of
the batch size (LAMB's rule). If you change the batch size, scale optimizer.learning_rate likewise; if
2048 images do not fit, use training.accumulation_steps. Not run on ImageNet with this code.
"""

import math

from configs.recipes import add_stochastic_depth, crops, reset


def apply(config):
    data, training, optimizer, schedule = config.data, config.training, config.optimizer, config.schedule
    reset(config)
    if crops(config):
        data.image_size, training.batch_size = 224, 2048
        data.eval_crop_fraction = 0.95
        config.evaluation.image_size = 0
    data.rotation_degrees = 0.0  # RandAugment rotates
    data.mixup, data.cutmix = 0.1, 1.0
    data.randaugment_ops = 0 if data.augmentation == "none" else 2
    data.randaugment_magnitude = 7.0
    add_stochastic_depth(config, 0.05)

    training.epochs = 300.0
    training.loss = "binary_cross_entropy"
    training.ema_decay = 0.9999

    optimizer.name, optimizer.b1, optimizer.b2, optimizer.eps = "lamb", 0.9, 0.999, 1e-6
    optimizer.learning_rate = 0.005 * math.sqrt(training.batch_size / 2048)
    optimizer.weight_decay, optimizer.decay_norm_and_bias, optimizer.clip_norm = 0.02, False, 1.0
    schedule.name, schedule.end_learning_rate = "cosine", 1e-6
    schedule.warmup_epochs = 5.0
    schedule.warmup_shape, schedule.warmup_learning_rate = "linear", 1e-4
