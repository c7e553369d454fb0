"""HGA-ResNet-164 (pre-activation, bottlenecks) on CIFAR-10 with the recipe of Identity Mappings.

    python train.py --config=configs/hga_cifar_resnet164.py --workdir=DIR
    python train.py --config=configs/hga_cifar_resnet164.py --workdir=DIR --config.data.name=cifar100

The paper's Table 4 has a top-1 error of 3.98 % on CIFAR-10 and 20.82 % on CIFAR-100 for HGA-R-164. Nobody
has yet trained this on CIFAR with this code. The table's other columns:
--config.model.attention=none (5.46, 24.33) and se (4.39, 21.31).
"""

from configs import hga_cifar_resnet110


def get_config():
    config = hga_cifar_resnet110.get_config()  # the same recipe
    config.model.name = "cifar_preact_resnet164_bottleneck"
    return config
