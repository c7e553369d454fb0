"""Does the linear MFE help? HGA with it, without it and with a nonlinear MFE, on Fashion-MNIST, 10 seeds.

    python -m hga_flax study studies/fashion_mnist_mfe.py --workers=2
    python -m hga_flax report studies/fashion_mnist_mfe.py

Uses the runs of fashion_mnist_attention.py and fashion_mnist_stages.py, compared with HGA without its MFE.
"""


def get_study():
    return {
        "about": "Whether the MFE helps on Fashion-MNIST: linear, as the equations have it, with BatchNorm, with ReLU.",
        "config": "configs/fashion_mnist_small.py",
        "directory": "runs/studies/fashion_mnist",
        "rows": {
            "hap_ee": ["model.attention=hga", "model.attention_options=mfe=False"],
            "hga": ["model.attention=hga"],
            "hga_mfe_norm": ["model.attention=hga", "model.attention_options=mfe_norm=True"],
            "hga_mfe_relu": ["model.attention=hga", "model.attention_options=mfe_act='relu'"],
        },
        "baseline": "hap_ee",
        "seeds": 10,
    }
