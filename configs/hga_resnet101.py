"""HGA-ResNet-101 on ImageNet with the paper's recipe.

    python train.py --config=configs/hga_resnet101.py --workdir=DIR

Reproduces Table 2, HGA-ResNet-101: top-1 / top-5 error 21.50 / 5.60 %. Not run here: nobody has yet
trained this on ImageNet with this code. Without ImageNet, --config.data.fake=true runs it on
synthetic images.
"""

from configs import hga_resnet50


def get_config():
    config = hga_resnet50.get_config()  # the same recipe
    config.model.name = "resnet101"
    return config
