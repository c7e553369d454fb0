"""Three attentions on the handwritten digits, 3 seeds each: a few minutes on two cores; `make study`.

    python -m hga_flax study studies/smoke.py --workers=2
    python -m hga_flax report studies/smoke.py

This demonstrates how a study runs. The digits are too easy to learn much about attentions.
"""


def get_study():
    return {
        "about": "How a study runs; 1,500 digits saturate, so that little can be learnt about attentions.",
        "config": "configs/digits.py",
        "overrides": [
            "model.name=cifar_resnet8",
            "model.options=features=8",
            "data.image_size=16",
            "training.epochs=6",
            "training.batch_size=64",
            "evaluation.every_epochs=6",
        ],
        "rows": {
            "none": ["model.attention=none"],
            "se": ["model.attention=se"],
            "hga": ["model.attention=hga"],
        },
        "baseline": "none",
        "seeds": 3,
    }
