"""Data that change under a run: the classes and labels that it was begun with decide, in every command."""

import json
import shutil

import cv2
import numpy as np
import pytest

from hga_flax.bench.dry_run import dry_run
from hga_flax.data import packing
from hga_flax.errors import UserError
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.training import trainer
from hga_flax.training.restore import evaluate_workdir
from hga_flax.training.trainer import train
from tests.training import tiny

CLASSES = ("ant", "bee")


def draw(label, random):
    """Class 0 is dark, class 1 bright."""
    return random.integers(0, 60, (10, 10, 3), np.uint8) + np.uint8(190 * label)


def write(folder, label, count=6):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(label)
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.png"), draw(label, random))


def config(data, **options):
    options = {"data__name": "folder", "data__eval_split": "val", "training__steps": 3, **options}
    return tiny.config(
        data__fake=False, data__dir=str(data), data__mean=(0.5,), data__augmentation="none", data__crop_padding=0,
        training__batch_size=8, model__attention="none", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps on a folder, and its error on `val`."""
    there = tmp_path_factory.mktemp("run")
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            write(there / "data" / split / name, label)
    train(config(there / "data"), str(there / "run"))
    return there, evaluate_workdir(str(there / "run"), "latest")["top1_error"]


@pytest.fixture
def copy(trained, tmp_path):
    """The same in a folder of its own: (data, run, error)."""
    for name in ("data", "run"):
        shutil.copytree(trained[0] / name, tmp_path / name)
    return tmp_path / "data", tmp_path / "run", trained[1]


def evaluate(data, run, **options):
    return evaluate_workdir(str(run), "latest", data_dir=str(data), **options)["top1_error"]


def goes_on(data, run, **options):
    train(config(data, training__steps=5, **options), str(run))


@pytest.mark.medium
def test_a_class_that_is_new_in_train_moves_no_label(copy, capfd):
    data, run, error = copy
    write(data / "train" / "aaa new", 1)
    assert evaluate(data, run) == error
    assert "train has classes that the run does not know: 'aaa new'" in capfd.readouterr().err
    before = (run / "dataset.json").read_text()
    for attempt in (goes_on, lambda data, run: dry_run(config(data), str(run))):
        with pytest.raises(UserError, match="the folder has 3 classes, the run 2: it adds 'aaa new'; restore the"):
            attempt(data, run)
    assert (run / "dataset.json").read_text() == before


@pytest.mark.medium
def test_a_class_that_is_renamed_is_refused_in_every_command(copy):
    data, run, _ = copy
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "zebra")
    before = (run / "dataset.json").read_text()
    for attempt in (evaluate, goes_on):
        with pytest.raises(UserError, match="2 classes, the run 2: it adds 'zebra' and it lacks 'ant'"):
            attempt(data, run)
    assert (run / "dataset.json").read_text() == before


@pytest.mark.medium
def test_a_run_that_has_no_checkpoint_yet_keeps_its_classes_too(copy):
    data, run, _ = copy
    shutil.rmtree(run / "checkpoints")
    write(data / "train" / "cat", 1)
    with pytest.raises(UserError, match="it adds 'cat'"):
        goes_on(data, run)
    assert json.loads((run / "dataset.json").read_text())["class_names"] == list(CLASSES)


def test_a_folder_with_test_alone_is_evaluated(copy):
    data, run, error = copy
    shutil.rmtree(data / "train")
    (data / "val").rename(data / "test")
    assert evaluate(data, run, split="test") == error


def worse_from_now_on(monkeypatch):
    """Every evaluation finds more errors than there were before."""
    real = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *given: real(*given) | {"top1_error": 100.0, "loss": 1e3})


@pytest.mark.medium
def test_splits_of_another_size_are_said_or_refused(copy, capfd, monkeypatch):
    data, run, _ = copy
    write(data / "val" / "bee", 1, count=8)
    said = "the split 'val' has 14 examples, and had 12 when the run began"
    evaluate(data, run)
    assert capfd.readouterr().err.count(said) == 1
    worse_from_now_on(monkeypatch)
    goes_on(data, run)
    assert capfd.readouterr().out.count(said) == 1
    assert Checkpoints(run, read_only=True).best_step() > 3
    write(data / "train" / "bee", 1, count=8)
    with pytest.raises(UserError, match="the training split has 14 examples, but this run started with 12"):
        train(config(data, training__steps=7), str(run))


@pytest.mark.medium
def test_other_files_of_equal_number_are_said_or_refused(copy, capfd, monkeypatch):
    data, run, error = copy
    said = "the split 'val' has files of other names or classes than when the run began"
    (data / "val" / "bee" / "0.png").rename(data / "val" / "bee" / "x.png")
    assert evaluate(data, run) == error
    assert capfd.readouterr().err.count(said) == 1
    worse_from_now_on(monkeypatch)
    goes_on(data, run)
    assert capfd.readouterr().out.count(said) == 1
    assert Checkpoints(run, read_only=True).best_step() > 3
    (data / "train" / "bee" / "0.png").rename(data / "train" / "ant" / "x.png")
    message = "the split 'train' has files of other names or classes than when the run began; restore the files"
    for command in (lambda: train(config(data, training__steps=7), str(run)), lambda: told(data, run)):
        with pytest.raises(UserError, match=message):
            command()
    known = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps({k: v for k, v in known.items() if k != "digests"}))
    write(data / "val" / "bee", 1, count=8)
    train(config(data, training__steps=7), str(run))  # a run of an older version knows of no files


def told(data, run):
    dry_run(config(data, training__steps=7), str(run))


def pack(folder, names, labels=(0, 1), count=12, name="mine"):
    shutil.rmtree(folder / name, ignore_errors=True)
    random = np.random.default_rng(0)
    examples = [(i, {"image": draw(i % 2, random), "label": labels[i % 2]}) for i in range(count)]
    splits = {split: lambda: iter(examples) for split in ("train", "val")}
    packing.pack(name, splits, names, (10, 10, 3), folder)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (("bee", "ant"), (1, 0), "2 classes, the run 2: they are in another order: label 0 is 'bee' there and"),
        (("ant", "bee", "cat"), (0, 1), "3 classes, the run 2: it adds 'cat'"),
        (("ant", "fly"), (0, 1), "it adds 'fly' and it lacks 'bee'"),
    ],
)
def test_a_packed_set_with_other_classes_is_refused(names, labels, message, tmp_path):
    pack(tmp_path / "data", CLASSES)
    run = tmp_path / "run"
    train(config(tmp_path / "data", data__name="mine", training__steps=1), str(run))
    evaluate(tmp_path / "data", run)
    pack(tmp_path / "data", names, labels)
    before = (run / "dataset.json").read_text()
    for attempt in (evaluate, lambda data, run: goes_on(data, run, data__name="mine")):
        with pytest.raises(UserError, match=message):
            attempt(tmp_path / "data", run)
    assert (run / "dataset.json").read_text() == before


@pytest.mark.medium
def test_the_paths_of_a_run_are_kept_absolute(copy, tmp_path, monkeypatch):
    data, _, error = copy
    monkeypatch.chdir(data.parent)
    train(config("data", training__compilation_cache="cache"), "relative")
    monkeypatch.chdir("/")
    saved = json.loads((tmp_path / "relative" / "config.json").read_text())
    assert saved["data"]["dir"] == str(data) and saved["training"]["compilation_cache"] == str(tmp_path / "cache")
    assert evaluate_workdir(str(tmp_path / "relative"), "latest")["top1_error"] == error


@pytest.mark.medium
def test_a_data_set_that_changed_is_refused(tmp_path):
    train(tiny.config(), str(tmp_path))
    with pytest.raises(UserError, match="the training split has 64 examples, but this run started with 48"):
        train(tiny.config(training__steps=8, data__fake_examples=64), str(tmp_path))
