"""A small HGA network on all of Fashion-MNIST: 60,000 training images, 10,000 test images.

    python -m hga_flax prepare fashion_mnist
    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

One run on 2 CPU cores, interrupted and resumed twice: top-1 error 8.36 % on all 10,000 test images.

The images come from Debian's package dataset-fashion-mnist if it is installed, else from TFDS.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = "cifar_resnet8"
    config.model.attention = "hga"

    config.data.name = "fashion_mnist"
    config.data.eval_split = "test"
    config.data.image_size = 28
    config.data.mean = (0.286,)
    config.data.std = (0.353,)
    config.data.augmentation = "small"
    config.data.rotation_degrees = 0.0
    config.data.crop_padding = 2
    config.data.num_threads = 2

    config.training.epochs = 10.0
    config.training.batch_size = 256

    config.optimizer.learning_rate = 0.2
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 0.5
    return config
