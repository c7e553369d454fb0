"""HGA-ResNeXt-50 32x4d on ImageNet with the paper's recipe.

    python train.py --config=configs/hga_resnext50.py --workdir=DIR

The paper's Table 2 has a top-1 / top-5 error of 20.22 / 4.88 % for HGA-ResNeXt-50. Nobody has yet trained this
on ImageNet with this code. Without ImageNet, --config.data.fake=true runs it on synthetic images.
"""

from configs import hga_resnet50


def get_config():
    config = hga_resnet50.get_config()  # the same recipe
    config.model.name = "resnext50_32x4d"
    return config
