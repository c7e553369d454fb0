"""The paper's recipe: SGD with step decay, 100 epochs, crops, flips and rotation.

    python train.py --config=FILE --recipe=paper --workdir=DIR

HGA (https://doi.org/10.3390/fi12110178), section 5.1; what it does not state follows SENet's recipe and
ResNet's weight decay, see configs/hga_resnet50.py. The recipe undoes the file's training settings (frozen
layers, rates of single layers, accumulation, ...; configs/recipes/__init__.py says what stays). Data
that are not cropped keep their image and batch size, and the rate is scaled in proportion to the batch
size (Goyal et al., https://arxiv.org/abs/1706.02677). Not run on ImageNet with this code.
"""

from configs.recipes import crops, reset


def apply(config):
    data, training, optimizer, schedule = config.data, config.training, config.optimizer, config.schedule
    reset(config)
    if crops(config):
        data.image_size, training.batch_size = 224, 1024
        data.eval_crop_fraction = 0.875
        config.evaluation.image_size = 0
    data.rotation_degrees = 0.0 if data.augmentation == "none" else 10.0

    training.epochs = 100.0
    optimizer.name, optimizer.momentum, optimizer.nesterov = "sgd", 0.9, False
    optimizer.learning_rate = 0.6 * training.batch_size / 1024
    optimizer.weight_decay, optimizer.decay_norm_and_bias = 1e-4, True
    schedule.name, schedule.decay_every_epochs, schedule.decay_factor = "step", 30.0, 0.1
