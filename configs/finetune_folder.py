"""Fine-tunes a trained ResNet-50, with HGA added, on a folder DIR/{train,val}/CLASS/*.jpg.

    python train.py --config=configs/finetune_folder.py --config.data.dir=DIR --config.init.weights=FILE --workdir=...

FILE is torchvision's or timm's resnet50 (.pth, .safetensors) or a run's folder. HGA starts as the identity, so
the network starts as the trained one; --config.model.attention=none --config.model.attention_options= omits HGA.
For a few hundred images, "--config.optimizer.freeze=stem*,stage1*" freezes the first layers;
"--config.optimizer.freeze=stem*,stage*" trains only the head (and the norms' running statistics).

The recipe is the common starting point of Li et al., Rethinking the Hyperparameters for Fine-tuning, ICLR 2020,
https://arxiv.org/abs/2002.11770: the network's own SGD with a learning rate of 0.01, momentum 0.9 and weight
decay 1e-4. The best rate depends on the data, so try 0.001 and 0.03 too. The new head learns ten times as fast.
It has not been run with ImageNet's weights; docs/practice.md has a run with others.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.name = "resnet50"
    config.model.attention = "hga"
    config.model.attention_options = "identity_start=True"

    config.data.name = "folder"
    config.data.eval_split = "val"
    config.data.augmentation = "imagenet"
    config.data.rotation_degrees = 0.0

    config.training.epochs = 30.0
    config.training.batch_size = 64
    config.training.log_every_steps = 10

    config.optimizer.learning_rate = 0.01
    config.optimizer.learning_rate_factors = ("classifier=10",)
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    return config
