"""Which of HGA's stages? The eight rows of Table 5 in a ResNet-8, on 4,000 images of Fashion-MNIST at 16x16, 10 seeds.

python -m hga_flax study studies/fashion_mnist_stages.py --workers=2
python -m hga_flax report studies/fashion_mnist_stages.py
"""

STAGES = {
    "hga": "",
    "hap_ee": "mfe=False",
    "mfe_ee": "hap=False",
    "mfe_hap": "ee=False",
    "mfe": "hap=False, ee=False",
    "hap": "mfe=False, ee=False",
    "ee": "mfe=False, hap=False",
}


def get_study():
    rows = {"none": ["model.attention=none"]}  # without its three stages HGA is the identity
    for name, options in STAGES.items():
        rows[name] = ["model.attention=hga", *([f"model.attention_options={options}"] if options else [])]
    return {
        "about": "Which of HGA's three stages help a small network on Fashion-MNIST (the small twin of Table 5).",
        "config": "configs/fashion_mnist_small.py",
        "directory": "runs/studies/fashion_mnist",
        "rows": rows,
        "baseline": "none",
        "seeds": 10,
    }
