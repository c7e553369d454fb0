"""HGA-ResNet-50 on ImageNet with the paper's recipe.

    python train.py --config=configs/hga_resnet50.py --workdir=DIR

The paper's Table 2 has a top-1 / top-5 error of 22.48 / 6.22 % for HGA-ResNet-50. Nobody has yet trained this
on ImageNet with this code. Without ImageNet, --config.data.fake=true runs it on synthetic images.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = "resnet50"
    config.model.attention = "hga"

    # Section 5.1 of the paper. What it does not state follows SENet's recipe (IEEE TPAMI, section 5.1) and
    # ResNet's weight decay. Neither has a warm-up: if the first steps diverge, set schedule.warmup_epochs.
    config.data.name = "imagenet2012"
    config.data.augmentation = "imagenet"
    config.data.flip = True
    config.data.rotation_degrees = 10.0
    config.data.image_size = 224

    config.training.epochs = 100.0
    config.training.batch_size = 1024

    config.optimizer.learning_rate = 0.6
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.decay_every_epochs = 30.0
    config.schedule.decay_factor = 0.1
    return config
