"""HGA-ResNet-101 on ImageNet with the paper's recipe.

    python train.py --config=configs/hga_resnet101.py --workdir=DIR

The paper's Table 2 has a top-1 / top-5 error of 21.50 / 5.60 % for HGA-ResNet-101. Nobody has yet trained this
on ImageNet with this code. Without ImageNet, --config.data.fake=true runs it on synthetic images.
"""

from configs import hga_resnet50


def get_config():
    config = hga_resnet50.get_config()  # the same recipe
    config.model.name = "resnet101"
    return config
