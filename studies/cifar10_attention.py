"""Which attention helps on photographs? CIFAR-10, 9 seeds per row, in two sizes.

    python -m hga_flax prepare folder DIR --name=cifar10_jpeg     # DIR/{train,test}/CLASS/*.jpg
    python -m hga_flax study studies/cifar10_attention.py
    python -m hga_flax report studies/cifar10_attention.py

    python -m hga_flax study studies/cifar10_attention.py --scale=large
    python -m hga_flax report studies/cifar10_attention.py --scale=large

The images are "CIFAR-10 as JPEG": a public copy re-encoded with 4:2:0 chroma, so its errors are not comparable
with those on the original. For the original, run the same study with --config.data.name=cifar10 (and --dir=ANOTHER).

The plan, written down before the first run:

* Training uses all 50,000 training images; the 10,000 test images are evaluated once per run, at its end.
* The recipe is configs/cifar10.py and `RECIPE`, which studies/cifar10_recipe.py decides on a split of the training
  images with the plain network alone, before any two rows are compared. It is the same for all rows.
* 6 rows with 9 seeds each are 54 runs, done seed by seed through all rows. With a standard deviation of 0.2 points
  between seeds, 9 seeds per row can detect 0.3 points (half a paired 95 % interval is then about 0.2 points before
  correction). The comparisons are the five other rows against `none`, corrected together by Holm's method.
* Nobody looks at differences before all 54 runs are finished. The report of an unfinished study is marked as such; it
  shows progress, not findings.
* The small size is what two cores can do in several working days: ResNet-14 for 10 epochs. The large size is ResNet-20
  for 30 epochs, for a GPU. Both are long enough for the plain network to fit, which RESULTS.md checks by comparing its
  errors on the training images (evaluate.py --split=train) and on the test images.
* Added when the recipe was decided, before the first run: a GPU is available for some minutes, so the small size runs
  there with `--workers=8`. Each of its runs must have one GPU; the large size may run anywhere.
* Finished on 2026-11-26, 54 of 54 runs, see RESULTS.md: at this size the network does not fit better than it
  generalises, so the condition above is not met, and only the large size can tell more.
"""

RECIPE = [  # what studies/cifar10_recipe.py changes in configs/cifar10.py
    "schedule.name=linear",
    "schedule.warmup_share=0.25",
    "optimizer.learning_rate=0.2",
]


def get_study():
    return {
        "about": "Which attention helps a small network on CIFAR-10 (as JPEG), and whether HGA's MFE does.",
        "config": "configs/cifar10.py",
        "overrides": ["data.name=cifar10_jpeg", *RECIPE, "evaluation.every_epochs=1000"],
        "scales": {
            "small": ["model.name=cifar_resnet14", "training.epochs=10", "checkpoint.every_steps=400"],
            "large": ["model.name=cifar_resnet20", "training.epochs=30"],
        },
        "rows": {
            "none": ["model.attention=none"],
            "se": ["model.attention=se"],
            "hga": ["model.attention=hga"],
            "hga_no_mfe": ["model.attention=hga", "model.attention_options=mfe=False"],
            "hga_mfe_relu": ["model.attention=hga", "model.attention_options=mfe_act='relu'"],
            "eca": ["model.attention=eca"],
        },
        "baseline": "none",
        "seeds": 9,
    }
