"""Table 5 of the paper: HGA with stages removed, in ResNet-101 and ResNeXt-101 on ImageNet, 3 seeds.

    python -m hga_flax study studies/table5.py --dir=SHARED_DIR          on any number of machines
    python -m hga_flax report studies/table5.py --dir=SHARED_DIR

Ready to start, not run: 48 runs of 100 epochs, of which 12 are shared with Table 2.
"""

NETWORKS = ("resnet101", "resnext101_32x4d")
STAGES = {  # remaining stages: options that remove the others
    "hap_ee": "mfe=False",
    "mfe_ee": "hap=False",
    "mfe_hap": "ee=False",
    "mfe": "hap=False, ee=False",
    "hap": "mfe=False, ee=False",
    "ee": "mfe=False, hap=False",
}


def get_study():
    rows, baseline = {}, {}
    for network in NETWORKS:
        # Without its three stages HGA is the identity: the plain network.
        for attention in ("none", "hga"):
            rows[f"{network}-{attention}"] = [f"model.name={network}", f"model.attention={attention}"]
        for name, options in STAGES.items():
            rows[f"{network}-{name}"] = [
                f"model.name={network}",
                "model.attention=hga",
                f"model.attention_options={options}",
            ]
        baseline |= {f"{network}-{name}": f"{network}-none" for name in ("hga", *STAGES)}
    return {
        "about": "Which of HGA's stages help on ImageNet (Table 5).",
        "config": "configs/hga_resnet50.py",
        "directory": "runs/studies/imagenet",
        "rows": rows,
        "baseline": baseline,
        "seeds": 3,
    }
