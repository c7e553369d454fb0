"""Which changes help most in few epochs? The recipe of configs/cifar10.py with one change in each row.

    python -m hga_flax prepare folder DIR --name=cifar10_jpeg     # DIR/{train,test}/CLASS/*.jpg
    python -m hga_flax study studies/cifar10_recipe.py
    python -m hga_flax report studies/cifar10_recipe.py

This decides the recipe of studies/cifar10_attention.py before any two of its rows are compared: with the plain
network alone, on a split of the training images (45,000 for training, 5,000 for evaluation), never on the test images.

The rule, written down before the first run: a change enters the study's recipe if its error is at least half a point
lower. Each row is one short run, and the error on 5,000 images has an uncertainty of about half a point: smaller
differences count as chance and do not change the recipe. If two changes of the same key pass, the lower error wins.
The changes that pass are not tried in combination.
"""


def get_study():
    return {
        "about": "Which changes of the recipe make few epochs go far, on a split of CIFAR-10's training images.",
        "config": "configs/cifar10.py",
        "overrides": [
            "data.name=cifar10_jpeg",
            "data.train_split=train[:45000]",
            "data.eval_split=train[45000:]",
            "model.name=cifar_resnet8",
            "training.epochs=4",
            "evaluation.every_epochs=1000",
        ],
        "rows": {
            "recipe": [],
            "plain_momentum": ["optimizer.nesterov=false"],
            "one_cycle": ["schedule.name=linear", "schedule.warmup_share=0.25"],
            "no_warmup": ["schedule.warmup_share=0"],
            "decay_1e-4": ["optimizer.weight_decay=1e-4"],
            "smoothing_0.1": ["training.label_smoothing=0.1"],
            "translation_4": ["data.crop_padding=4"],
            "random_flip": ["data.alternating_flip=false"],
            "average": ["training.ema_decay=0.99"],
            "rate_0.2": ["optimizer.learning_rate=0.2"],
        },
        "baseline": "recipe",
        "seeds": 1,
    }
