"""HGA-ResNet-20 on scikit-learn's handwritten digits: the demo, which takes two minutes on two cores.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = "cifar_resnet20"
    config.model.attention = "hga"

    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 24  # the originals are 8x8, but 24 works better than 16
    config.data.mean = (0.3,)
    config.data.std = (0.37,)
    config.data.augmentation = "small"
    config.data.flip = False  # a mirrored 2 is not a digit
    config.data.crop_padding = 2
    config.data.rotation_degrees = 10.0
    config.data.num_threads = 2

    config.training.epochs = 24.0
    config.training.batch_size = 128
    config.training.log_every_steps = 20

    config.optimizer.learning_rate = 0.1
    config.schedule.name = "cosine"
    config.evaluation.every_epochs = 3.0
    return config
