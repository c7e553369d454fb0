"""Which attention? A ResNet-8 with each of them, on 4,000 images of Fashion-MNIST at 16x16, 5 seeds.

    python -m hga_flax study studies/fashion_mnist_attention.py --workers=2
    python -m hga_flax report studies/fashion_mnist_attention.py

A small version of Tables 2 and 3. The rows shared with the other studies of Fashion-MNIST are trained only once.
"""


def get_study():
    return {
        "about": "Which attention helps a small network on Fashion-MNIST (the small twin of Tables 2 and 3).",
        "config": "configs/fashion_mnist_small.py",
        "directory": "runs/studies/fashion_mnist",
        "rows": {
            "none": ["model.attention=none"],
            "hga": ["model.attention=hga"],
            "se": ["model.attention=se"],
            "sk": ["model.attention=sk"],
            "eca": ["model.attention=eca"],
            "cbam": ["model.attention=cbam"],
            "gc": ["model.attention=gc"],
            "nl": ["model.attention=nl"],
            "hga_mfe_norm": ["model.attention=hga", "model.attention_options=mfe_norm=True"],
            "hga_mfe_relu": ["model.attention=hga", "model.attention_options=mfe_act='relu'"],
        },
        "baseline": "none",
        "seeds": 5,
    }
