"""Which kernels of the MFE? Table 6's five rows in a ResNet-8, on 4,000 images of Fashion-MNIST at 16x16, 10 seeds.

python -m hga_flax study studies/fashion_mnist_kernels.py --workers=2
python -m hga_flax report studies/fashion_mnist_kernels.py
"""


def get_study():
    rows = {"hga": ["model.attention=hga"]}
    for size in (1, 3, 5, 7):
        rows[f"hga_{size}x{size}"] = ["model.attention=hga", f"model.attention_options=kernels=({size},)"]
    return {
        "about": "Whether four kernel sizes in the MFE are better than one, on Fashion-MNIST (the small twin of "
        "Table 6).",
        "config": "configs/fashion_mnist_small.py",
        "directory": "runs/studies/fashion_mnist",
        "rows": rows,
        "baseline": "hga",
        "seeds": 10,
    }
