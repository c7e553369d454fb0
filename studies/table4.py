"""Table 4 of the paper: plain, SE and HGA R-110 and R-164 on CIFAR-10 and CIFAR-100, 5 seeds.

    python -m hga_flax prepare cifar10 && python -m hga_flax prepare cifar100
    python -m hga_flax study studies/table4.py --dir=SHARED_DIR          on any number of machines
    python -m hga_flax report studies/table4.py --dir=SHARED_DIR

Ready to start, not run: 60 runs of 64,000 steps.
"""

NETWORKS = {"r110": "cifar_preact_resnet110", "r164": "cifar_preact_resnet164_bottleneck"}
GROUPS = [(data, network) for data in ("cifar10", "cifar100") for network in NETWORKS]


def get_study():
    rows = {
        f"{data}-{network}-{attention}": [
            f"data.name={data}",
            f"model.name={NETWORKS[network]}",
            f"model.attention={attention}",
        ]
        for data, network in GROUPS
        for attention in ("none", "se", "hga")
    }
    return {
        "about": "Attention mechanisms on CIFAR-10 and CIFAR-100 (Table 4).",
        "config": "configs/hga_cifar_resnet110.py",
        "rows": rows,
        "baseline": {f"{d}-{n}-{attention}": f"{d}-{n}-none" for d, n in GROUPS for attention in ("se", "hga")},
        "seeds": 5,
    }
