"""HGA-GoogLeNet (Inception v1) on ImageNet: Fig. 2d, HGA after each Inception block.

    python train.py --config=configs/hga_googlenet.py --workdir=DIR

The paper proposes this placement but reports no results for it, so there is nothing to reproduce. The
recipe is that of its ResNets; it has not been run on ImageNet with this code. The two auxiliary heads
are trained with a weight of 0.3 each, as in Szegedy et al., https://arxiv.org/abs/1409.4842.
"""

from configs import hga_resnet50


def get_config():
    config = hga_resnet50.get_config()  # the same recipe
    config.model.name = "googlenet"
    config.model.options = "aux_logits=True"
    return config
