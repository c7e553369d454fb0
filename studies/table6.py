"""Table 6 of the paper: HGA with one kernel size, in ResNet-101 and ResNeXt-101 on ImageNet, 3 seeds.

    python -m hga_flax study studies/table6.py --dir=SHARED_DIR          on any number of machines
    python -m hga_flax report studies/table6.py --dir=SHARED_DIR

Ready to start, not run: 30 runs of 100 epochs, of which 6 are shared with Table 2.
"""

NETWORKS = ("resnet101", "resnext101_32x4d")


def get_study():
    rows, baseline = {}, {}
    for network in NETWORKS:
        rows[f"{network}-hga"] = [f"model.name={network}", "model.attention=hga"]
        for size in (1, 3, 5, 7):
            name = f"{network}-hga_{size}x{size}"
            rows[name] = [*rows[f"{network}-hga"], f"model.attention_options=kernels=({size},)"]
            baseline[name] = f"{network}-hga"
    return {
        "about": "Whether four kernel sizes are better than one on ImageNet (Table 6).",
        "config": "configs/hga_resnet50.py",
        "directory": "runs/studies/imagenet",
        "rows": rows,
        "baseline": baseline,
        "seeds": 3,
    }
