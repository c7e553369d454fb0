"""HGA-ResNeXt-50 32x4d on ImageNet with the paper's recipe.

    python train.py --config=configs/hga_resnext50.py --workdir=DIR

Reproduces Table 2, HGA-ResNeXt-50: top-1 / top-5 error 20.22 / 4.88 %. Not run here: nobody has yet
trained this on ImageNet with this code. Without ImageNet, --config.data.fake=true runs it on
synthetic images.
"""

from configs import hga_resnet50


def get_config():
    config = hga_resnet50.get_config()  # the same recipe
    config.model.name = "resnext50_32x4d"
    return config
