"""Table 2 of the paper: HGA in five networks on ImageNet, 3 seeds, each compared with its plain network.

    python -m hga_flax study studies/table2.py --dir=SHARED_DIR          on any number of machines
    python -m hga_flax report studies/table2.py --dir=SHARED_DIR

Ready to start, not run: 45 runs of 100 epochs. `hga_table2` has the parameter counts of the paper.
"""

NETWORKS = ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x4d")
ATTENTIONS = ("none", "hga", "hga_table2")


def get_study():
    return {
        "about": "HGA in five networks on ImageNet (Table 2).",
        "config": "configs/hga_resnet50.py",
        "directory": "runs/studies/imagenet",
        "rows": {
            f"{network}-{attention}": [f"model.name={network}", f"model.attention={attention}"]
            for network in NETWORKS
            for attention in ATTENTIONS
        },
        "baseline": {
            f"{network}-{attention}": f"{network}-none" for network in NETWORKS for attention in ATTENTIONS[1:]
        },
        "seeds": 3,
    }
