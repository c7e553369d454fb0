"""HGA-ResNet-110 (pre-activation, basic blocks) on CIFAR-10 with the recipe of Identity Mappings.

    python train.py --config=configs/hga_cifar_resnet110.py --workdir=DIR
    python train.py --config=configs/hga_cifar_resnet110.py --workdir=DIR --config.data.name=cifar100

The paper's Table 4 has a top-1 error of 4.52 % on CIFAR-10 and 22.02 % on CIFAR-100 for HGA-R-110. Nobody
has yet trained this on CIFAR with this code. The table's other columns:
--config.model.attention=none (6.37, 26.88) and se (5.21, 23.85).
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = "cifar_preact_resnet110"
    config.model.attention = "hga"

    config.data.name = "cifar10"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)  # statistics of the training images
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.augmentation = "small"
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.rotation_degrees = 0.0

    # He et al., Identity Mappings (https://arxiv.org/abs/1603.05027), the source of the table's plain
    # figures: 64k steps, the first 400 at a learning rate of 0.01.
    config.training.steps = 64000
    config.training.batch_size = 128
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.decay_at_steps = (32000, 48000)
    config.schedule.decay_factor = 0.1
    config.schedule.warmup_steps = 400
    config.schedule.warmup_shape = "constant"
    config.schedule.warmup_learning_rate = 0.01
    return config
