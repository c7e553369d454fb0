"""ResNet-20 on CIFAR-10.

    python -m hga_flax prepare cifar10
    python train.py --config=configs/cifar10.py --workdir=runs/cifar10

The first command downloads CIFAR-10 and needs TensorFlow; training does not. Images in folders
DIR/{train,test}/CLASS/ need no preparation: --config.data.name=folder --config.data.dir=DIR.

A shorter run, another network or an attention takes one flag each; warm-up and schedule scale with the length:

    --config.training.epochs=10
    --config.model.name=cifar_resnet56
    --config.model.attention=hga

--config.training.steps=200 is a quick check that everything works: it takes minutes on two cores.
For few epochs (4), studies/cifar10_recipe.py found a better recipe, which studies/cifar10_attention.py uses:
--config.schedule.name=linear --config.schedule.warmup_share=0.25 --config.optimizer.learning_rate=0.2
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = "cifar_resnet20"

    config.data.name = "cifar10"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)  # statistics of the training images
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.augmentation = "small"
    config.data.crop_padding = 2
    config.data.alternating_flip = True
    config.data.rotation_degrees = 0.0
    config.data.num_threads = 2

    config.training.epochs = 100.0
    config.training.batch_size = 128

    config.optimizer.learning_rate = 0.1
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.schedule.warmup_share = 0.1
    config.evaluation.every_epochs = 10.0
    config.evaluation.batch_size = 500
    return config
