"""Table 3 of the paper: SE, SK and HGA on ImageNet, 3 seeds, each compared with its plain network.

    python -m hga_flax study studies/table3.py --dir=SHARED_DIR          on any number of machines
    python -m hga_flax report studies/table3.py --dir=SHARED_DIR

Ready to start, not run: 51 runs of 100 epochs, 30 of them shared with Table 2. SK runs only where the paper reports it.
"""

NETWORKS = {
    "resnet50": ("none", "se", "hga"),
    "resnet101": ("none", "se", "hga"),
    "resnet152": ("none", "se", "hga"),
    "resnext50_32x4d": ("none", "se", "sk", "hga"),
    "resnext101_32x4d": ("none", "se", "sk", "hga"),
}


def get_study():
    pairs = [(network, attention) for network, attentions in NETWORKS.items() for attention in attentions]
    return {
        "about": "Attention mechanisms on ImageNet (Table 3).",
        "config": "configs/hga_resnet50.py",
        "directory": "runs/studies/imagenet",
        "rows": {f"{n}-{a}": [f"model.name={n}", f"model.attention={a}"] for n, a in pairs},
        "baseline": {f"{n}-{a}": f"{n}-none" for n, a in pairs if a != "none"},
        "seeds": 3,
    }
