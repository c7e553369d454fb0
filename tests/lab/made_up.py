"""Studies for tests: a file, and a folder of runs whose results are made up."""

import json

ROWS = {"none": ["model.attention=none"], "se": ["model.attention=se"], "hga": ["model.attention=hga"]}
TINY = [
    "model.name=cifar_resnet8",
    "model.options=features=4",
    "data.image_size=8",
    "data.fake=true",
    "data.fake_examples=48",
    "training.batch_size=16",
    "training.steps=2",
]


def values(**overrides):
    """What a study file holds."""
    return {
        "config": "configs/digits.py",
        "overrides": TINY,
        "rows": ROWS,
        "baseline": "none",
        "seeds": 3,
    } | overrides


def write_study(folder, name="made_up", **overrides):
    """Writes a Python study file; returns its path as text."""
    file = folder / f"{name}.py"
    file.write_text(f"def get_study():\n    return {values(**overrides)!r}\n")
    return str(file)


def write_result(workdir, top1_error, **more):
    """Writes what a finished run leaves."""
    workdir.mkdir(parents=True, exist_ok=True)
    result = {"top1_error": top1_error, "top5_error": top1_error / 10, "loss": top1_error / 50, "step": 2}
    result |= {"seconds": 60.0, "sessions": 1, "device": "2 CPU cores", "jax": "0"}
    (workdir / "result.json").write_text(json.dumps(result | more))
