"""configs/finetune_folder.py as a user runs it: weights trained on digits, a folder of drawings, one command."""

import cv2
import numpy as np
import pytest

from hga_flax.training.initial_weights import fit_weights
from hga_flax.training.restore import restore_workdir
from hga_flax.training.trainer import train
from tests.commands import run
from tests.training import tiny

NETWORK = {"model__name": "cifar_resnet8", "model__options": "features=8", "model__attention": "none"}
CLASSES = ("circle", "cross", "ring", "square", "stripes", "triangle")


def draw(name, random):
    """A drawing of 36 x 40 pixels: random colours, place, size and noise."""
    image = np.full((36, 40, 3), random.integers(0, 90, 3), np.uint8)
    colour, size = tuple(int(c) for c in random.integers(130, 256, 3)), int(random.integers(8, 13))
    x, y = int(random.integers(14, 27)), int(random.integers(14, 23))
    if name in ("circle", "ring"):
        cv2.circle(image, (x, y), size, colour, -1 if name == "circle" else 2)
    elif name == "square":
        cv2.rectangle(image, (x - size, y - size), (x + size, y + size), colour, -1)
    elif name == "triangle":
        cv2.fillPoly(image, [np.array([(x - size, y + size), (x + size, y + size), (x, y - size)])], colour)
    elif name == "cross":
        cv2.line(image, (x - size, y - size), (x + size, y + size), colour, 3)
        cv2.line(image, (x - size, y + size), (x + size, y - size), colour, 3)
    else:
        for row in range(int(random.integers(0, 6)), 36, 6):
            cv2.line(image, (0, row), (39, row), colour, 2)
    return np.clip(image + random.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(folder / f"{i}.png"), draw(name, random))
    return root


@pytest.mark.medium
def test_one_command_beats_chance_by_far_and_leaves_what_is_frozen(drawings, tmp_path):
    source, workdir = tmp_path / "digits", tmp_path / "drawings"
    c = tiny.config(**NETWORK, data__fake=False, training__steps=20, evaluation__every_epochs=100.0)
    train(c, str(source))
    result = run(
        "train.py", "--config=configs/finetune_folder.py", f"--config.data.dir={drawings}",
        f"--config.init.weights={source}", f"--workdir={workdir}", "--config.model.name=cifar_resnet8",
        "--config.model.options=features=8", "--config.model.attention_options=identity_start=True, kernels=(1, 3)",
        "--config.data.image_size=32", "--config.training.batch_size=30", "--config.optimizer.learning_rate=0.05",
        "--config.optimizer.freeze=stem*", "--config.data.num_threads=1",
        f"--config.training.compilation_cache={c.training.compilation_cache}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line in (
        "frozen      ",
        "rates       classifier x 10",
        "loaded  ",
        "stem_conv/kernel: its input channel repeated",
    ):
        assert line in result.stdout
    restored = restore_workdir(str(workdir))
    assert restored.experiment.dataset.info.class_names == CLASSES
    error = float(next(x for x in result.stdout.splitlines() if x.startswith("last ")).split()[3])
    assert error < 40, result.stdout  # by chance 83.3
    start = fit_weights(restored.experiment.config, restored.state).loaded
    ours = {"params": restored.state.params, "batch_stats": restored.state.batch_stats}
    for path, array in start.items():
        if path[0] == "params":
            frozen = path[1].startswith("stem")
            assert np.array_equal(_leaf(ours, path), array) == frozen, path


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree
