"""The paper's recipe: SGD with steps, 100 epochs, crops, flips and rotation.

    python train.py --config=FILE --recipe=paper --workdir=DIR

HGA (https://doi.org/10.3390/fi12110178), section 5.1; what it leaves open is SENet's recipe and
ResNet's weight decay, see configs/hga_resnet50.py. It undoes what another file may have set. Data
that are not cropped keep their size and their batch, for which the rate is scaled in proportion
(Goyal et al., https://arxiv.org/abs/1706.02677). Not run on ImageNet with this code.
"""

from configs.recipes import crops


def apply(config):
    data, training, optimizer, schedule = config.data, config.training, config.optimizer, config.schedule
    if crops(config):
        data.image_size, training.batch_size = 224, 1024
        data.eval_crop_fraction = 0.875
    data.alternating_flip = False
    data.rotation_degrees = 0.0 if data.augmentation == "none" else 10.0
    data.random_erasing = data.mixup = data.cutmix = 0.0
    data.randaugment_ops = 0
    config.evaluation.image_size = 0

    training.epochs, training.steps = 100.0, 0
    training.loss, training.label_smoothing, training.ema_decay = "cross_entropy", 0.0, 0.0

    optimizer.name, optimizer.momentum, optimizer.nesterov = "sgd", 0.9, False
    optimizer.learning_rate = 0.6 * training.batch_size / 1024
    optimizer.weight_decay, optimizer.decay_norm_and_bias, optimizer.clip_norm = 1e-4, True, 0.0
    schedule.name, schedule.decay_every_epochs, schedule.decay_factor = "step", 30.0, 0.1
    schedule.decay_at_steps = ()
    schedule.warmup_steps, schedule.warmup_epochs, schedule.warmup_share = 0, 0.0, 0.0
