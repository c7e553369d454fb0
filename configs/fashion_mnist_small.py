"""HGA-ResNet-8 on 4,000 images of Fashion-MNIST, at 16x16, for 5 epochs: the recipe of the two-core studies.

    python -m hga_flax prepare fashion_mnist
    python train.py --config=configs/fashion_mnist_small.py --workdir=runs/fashion_mnist_small

It is evaluated once, at the end, on all 10,000 test images.
"""

from configs import fashion_mnist


def get_config():
    config = fashion_mnist.get_config()
    config.data.train_split = "train[:4000]"
    config.data.image_size = 16  # a third of the time of 28, and HGA's grids divide maps of 16, 8 and 4
    config.data.crop_padding = 1
    config.training.epochs = 5.0
    config.training.batch_size = 50
    config.evaluation.every_epochs = 5.0
    config.evaluation.batch_size = 500
    config.optimizer.learning_rate = 0.1
    return config
