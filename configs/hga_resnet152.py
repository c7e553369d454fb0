"""HGA-ResNet-152 on ImageNet with the paper's recipe.

    python train.py --config=configs/hga_resnet152.py --workdir=DIR

The paper's Table 2 has a top-1 / top-5 error of 20.63 / 5.23 % for HGA-ResNet-152. Nobody has yet trained this
on ImageNet with this code. Without ImageNet, --config.data.fake=true runs it on synthetic images.
"""

from configs import hga_resnet50


def get_config():
    config = hga_resnet50.get_config()  # the same recipe
    config.model.name = "resnet152"
    return config
