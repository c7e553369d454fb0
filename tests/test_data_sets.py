"""TFDS's real data sets, small: prepared, trained on and evaluated by the commands that the full ones take."""

import importlib.util
import io
import json
import tarfile

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from hga_flax.__main__ import main
from hga_flax.config.loading import load_config
from hga_flax.data.packing import _Packed
from hga_flax.data.sources import dataset_info, open_source
from hga_flax.lab.plan import check_rows
from hga_flax.lab.study import changes, load_study
from hga_flax.training.restore import evaluate_workdir
from hga_flax.training.trainer import train
from tests.commands import ROOT

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TFDS's imagenet2012 builder needs TensorFlow, which is not installed",
)
SYNSETS = ("n01440764", "n01443537")  # labels 0 and 1


def jpeg(seed):
    """A piece of a photograph."""
    random, photo = np.random.RandomState(seed), load_sample_image("china.jpg")
    top, left = random.randint(0, 300), random.randint(0, 500)
    return cv2.imencode(".jpg", photo[top : top + 100, left : left + 120, ::-1])[1].tobytes()


def tar(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def small(path, data_dir, **overrides):
    """A shipped configuration cut down to a few steps."""
    config = load_config(path)
    with config.unlocked():
        config.data.dir, config.data.num_threads = str(data_dir), 2
        config.training.batch_size, config.training.steps, config.training.log_every_steps = 16, 2, 1
        config.evaluation.batch_size, config.optimizer.learning_rate = 8, 0.001
        config.training.compilation_cache = ""
        for key, value in overrides.items():
            group, name = key.split("__")
            config[group][name] = value
    return config


def trains_and_evaluates(config, workdir, num_examples, classes):
    train(config, str(workdir))
    assert evaluate_workdir(str(workdir), "latest")["num_examples"] == num_examples
    losses = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in row for row in losses) == 2
    assert len(json.loads((workdir / "dataset.json").read_text())["class_names"]) == classes


@needs_tensorflow
@pytest.mark.slow
def test_imagenet_from_tars_of_the_official_names_and_layout(tmp_path):
    classes = {
        f"{name}.tar": tar({f"{name}_{i}.JPEG": jpeg(100 * label + i) for i in range(12)})
        for label, name in enumerate(SYNSETS)
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    validation = {f"ILSVRC2012_val_{i:08}.JPEG": jpeg(1000 + i) for i in range(1, 12)}
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar(validation))
    data = tmp_path / "data"
    main(["prepare", "imagenet2012", f"--data-dir={data}", f"--manual-dir={tmp_path}"])
    source = open_source("imagenet2012", "train", str(data))
    found = {source[i]["file_name"].decode(): (source[i]["image"], source[i]["label"]) for i in range(24)}
    assert found[f"{SYNSETS[1]}_3.JPEG"] == (jpeg(103), 1) and len(source) == 24
    config = small(
        "configs/hga_resnext50.py",
        data,
        data__image_size=32,
        model__options="stage_sizes=(1, 1), features=16",
        model__attention_options="reduced_channels=8",
    )
    trains_and_evaluates(config, tmp_path / "run", 11, 1000)


@pytest.mark.slow
def test_cifar_by_its_name(tmp_path):
    import tensorflow_datasets as tfds

    real = tfds.builder("cifar10", data_dir=str(tmp_path))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = dict(real.info.features) | {"label": tfds.features.ClassLabel(names=names)}
    random = np.random.RandomState(0)

    def examples(split, count):
        for i in range(count):
            image = random.randint(0, 256, (32, 32, 3)).astype(np.uint8)
            yield f"{split}_{i:05}", {"id": f"{split}_{i:05}", "image": image, "label": i % 10}

    splits = {"train": lambda: examples("train", 40), "test": lambda: examples("test", 19)}
    _Packed("cifar10", str(real.version), features, splits, str(tmp_path)).download_and_prepare()
    assert dataset_info("cifar10", str(tmp_path)).class_names == tuple(names)
    options = {"model__options": "features=4", "schedule__warmup_share": 0.5}
    config = small("configs/cifar10.py", tmp_path, model__name="cifar_resnet8", **options)
    trains_and_evaluates(config, tmp_path / "run", 19, 10)
    # The study of attentions is the same study on it, by one override (and where it lies here).
    file = str(ROOT / "studies" / "cifar10_attention.py")
    ours = load_study(file, check=False)
    overrides = ["--config.data.name=cifar10", f"--config.data.dir={tmp_path}"]
    study = load_study(file, overrides=overrides)
    for name, row in study.rows.items():
        assert changes(ours.rows[name].config, row.config) == ["data.name: cifar10_jpeg -> cifar10"]
    # A run has one device; here are eight, which a batch of 500 does not divide by.
    check_rows(
        load_study(file, overrides=[*overrides, "--config.evaluation.batch_size=16", "--config.training.batch_size=16"])
    )
