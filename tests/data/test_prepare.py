import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import types

import cv2
import numpy as np
import pytest

from hga_flax.__main__ import main
from hga_flax.data import prepare
from hga_flax.data.arrays import read_idx
from hga_flax.data.sources import dataset_info, open_source
from hga_flax.errors import UserError
from hga_flax.images.decoding import decode
from tests.data.test_arrays import IMAGES, LABELS, write_idx

# Over the sorted (label, pixels) of both splits, and so independent of order, container and compression.
FASHION_MNIST_SHA256 = "63d3beefc9df4f4ae0e1026c60772b548603cdbf9372d6114e03d4a22a10241f"
no_fashion_mnist = pytest.mark.skipif(
    not prepare.FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)
no_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TFDS's own builder needs TensorFlow, which is not installed"
)


def checksum(splits):
    """Returns one hash of `{split: [(image, label)]}`."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        for row in sorted(bytes([label]) + np.ascontiguousarray(image).tobytes() for image, label in splits[split]):
            digest.update(row)
    return digest.hexdigest()


def records(name, split, data_dir, channels):
    source = open_source(name, split, str(data_dir))
    return [(decode(r["image"], channels), int(r["label"])) for r in (source[i] for i in range(len(source)))]


def test_arrays_are_read_by_name_afterwards(tmp_path):
    colour = np.stack([IMAGES, IMAGES // 2, 255 - IMAGES], axis=-1)
    np.savez(tmp_path / "my-set.npz", x_train=colour, y_train=LABELS, x_test=colour[:2], y_test=LABELS[:2])
    data = tmp_path / "data"
    main(["prepare", "arrays", str(tmp_path / "my-set.npz"), "--data-dir", str(data), "--class-names=a,b,c"])
    assert dataset_info("my_set", str(data)).class_names == ("a", "b", "c")
    expected = {"train": list(zip(colour, LABELS, strict=True)), "test": list(zip(colour[:2], LABELS[:2], strict=True))}
    assert checksum({s: records("my_set", s, data, 3) for s in expected}) == checksum(expected)
    assert len(open_source("my_set", "train[:60%]", str(data))) == 3
    with pytest.raises(UserError, match="already exists"):
        main(["prepare", "arrays", str(tmp_path / "my-set.npz"), "--data-dir", str(data)])
    with pytest.raises(UserError, match="did you mean 'my_set'"):
        dataset_info("myset", str(data))


def test_idx_files_are_packed_as_a_subprocess(tmp_path):
    write_idx(tmp_path, "train", IMAGES, LABELS, compress=True)
    command = [sys.executable, "-m", "hga_flax", "prepare", "idx", str(tmp_path), "--name=mine"]
    done = subprocess.run([*command, f"--data-dir={tmp_path}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--config.data.name=mine" in done.stdout
    assert done.stderr.splitlines() == ["train examples: 5"]  # in a pipe a line, and no bar
    expected = {"train": list(zip(IMAGES, LABELS, strict=True))}
    assert checksum({"train": records("mine", "train", tmp_path, 1)}) == checksum(expected)


def test_a_folder_is_packed_with_its_bytes_and_names(tmp_path, capsys):
    folder = tmp_path / "pets" / "train" / "cat"
    folder.mkdir(parents=True)
    data = cv2.imencode(".jpg", np.zeros((6, 5, 3), np.uint8))[1].tobytes()
    (folder / "0.jpg").write_bytes(data)
    (folder / "1.jpg").write_bytes(b"")  # packed as it is: training skips and names it
    main(["prepare", "folder", str(tmp_path / "pets"), "--data-dir", str(tmp_path)])
    source = open_source("pets", "train", str(tmp_path))
    found = {bytes(source[i]["file_name"]): bytes(source[i]["image"]) for i in range(len(source))}
    assert found == {b"train/cat/0.jpg": data, b"train/cat/1.jpg": b""}
    assert dataset_info("pets", str(tmp_path)).class_names == ("cat",)
    said = capsys.readouterr().err
    assert "warning: train/cat/1.jpg: the file is empty" in said and "train/cat/0.jpg" not in said
    assert "warning: 1 of 2 images cannot be decoded; they are packed too" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arrays"], "name the file too"),
        (["folder", "/absent"], "does not exist"),
        (["arrays", __file__, "--name=cifar10"], "a data set of that name already exists"),
        (["arrays", __file__, "--name=digits"], "--name=digits: this name is reserved; choose another"),
        (["arrays", __file__, "--name=Mine"], "lowercase letters"),
        (["arrays", __file__], "cannot be read as .npz"),
        (["cifar11"], "did you mean .cifar1"),
        (["cifar10", "--name=x"], "are for folder, arrays, idx"),
        (["cifar10/foo"], "TFDS cannot open it"),
        (["cifar10:9.9.9"], "TFDS cannot open it"),
        (["my set"], "prepare='my set': not the name of a data set; write NAME"),
        (["../x"], "not the name of a data set"),
        (["arrays", "x" * 5000], "File name too long"),
        (["idx", "/tmp", "--manual-dir=/absent"], "--manual-dir is for TFDS data sets; leave it out"),
        (["imagenet2012"], "missing in .*manual: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar"),
    ],
)
def test_what_cannot_be_prepared_is_said_in_one_line(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        main(["prepare", *arguments, "--data-dir", str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_imagenet_names_sizes_folder_and_command(tmp_path):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        main(["prepare", "imagenet2012", "--data-dir", str(tmp_path), "--manual-dir", str(tmp_path)])
    for text in ("147,897,477,120 bytes", "6,744,924,160 bytes", f"missing in {tmp_path}: ILSVRC2012_img_train.tar."):
        assert text in str(caught.value)
    assert f"prepare imagenet2012 --data-dir={tmp_path} --manual-dir={tmp_path}" in str(caught.value)


def test_without_tensorflow_the_step_that_needs_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorflow"):
        main(["prepare", "cifar10", "--data-dir", str(tmp_path)])


@no_fashion_mnist
@pytest.mark.slow
def test_fashion_mnist_from_debian(tmp_path, capsys):
    main(["prepare", "fashion_mnist", "--data-dir", str(tmp_path)])
    splits = {split: records("fashion_mnist", split, tmp_path, 1) for split in ("train", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 60000, "test": 10000}
    assert dataset_info("fashion_mnist", str(tmp_path)).class_names[-1] == "Ankle boot"
    assert checksum(splits) == FASHION_MNIST_SHA256
    capsys.readouterr()
    main(["prepare", "fashion_mnist", "--data-dir", str(tmp_path)])
    assert "already prepared" in capsys.readouterr().out


@no_fashion_mnist
@no_tensorflow
@pytest.mark.slow
def test_tfds_makes_the_same_fashion_mnist(tmp_path, monkeypatch):
    """TFDS's own builder, handed the files that it would have fetched."""
    import gzip

    import tensorflow_datasets as tfds

    local = {}
    for file in prepare.FASHION_MNIST.iterdir():
        (tmp_path / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        local[file.name] = str(tmp_path / file.stem)
    fetch = lambda self, urls: {key: local[pathlib.PurePosixPath(url).name] for key, url in urls.items()}
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fetch)
    monkeypatch.setattr(prepare, "FASHION_MNIST", tmp_path / "absent")
    main(["prepare", "fashion_mnist", "--data-dir", str(tmp_path)])
    splits = {split: records("fashion_mnist", split, tmp_path, 1) for split in ("train", "test")}
    assert checksum(splits) == FASHION_MNIST_SHA256


@no_fashion_mnist
def test_the_checksum_is_that_of_the_files():
    arrays = read_idx(prepare.FASHION_MNIST)
    splits = {split: list(zip(*arrays.splits[split], strict=True)) for split in arrays.splits}
    assert checksum(splits) == FASHION_MNIST_SHA256


KILLED = """
import os, sys
from hga_flax.data import prepare, packing
original = packing._Packed._generate_examples
def dies(self, *arguments):
    for i, example in enumerate(original(self, *arguments)):
        if i == 3:
            os._exit(9)
        yield example
packing._Packed._generate_examples = dies
from hga_flax.__main__ import main
main(sys.argv[1:])
"""


def test_a_killed_preparation_is_begun_again(tmp_path):
    write_idx(tmp_path, "train", IMAGES, LABELS)
    arguments = ["prepare", "idx", str(tmp_path), "--name=mine", f"--data-dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=120)
    assert done.returncode == 9
    assert list((tmp_path / "mine").glob(".preparing-*"))
    with pytest.raises(UserError, match="no data set 'mine'"):
        dataset_info("mine", str(tmp_path))
    main(arguments)
    assert len(open_source("mine", "train", str(tmp_path))) == 5
    assert not list((tmp_path / "mine").glob(".preparing-*"))


def test_a_folder_without_splits_is_not_packed(tmp_path):
    (tmp_path / "photos" / "holiday" / "beach").mkdir(parents=True)
    with pytest.raises(UserError, match=r"photos holds no images in class folders, such as .*photos/train/cat$"):
        main(["prepare", "folder", str(tmp_path / "photos"), "--data-dir", str(tmp_path / "data")])
    assert not (tmp_path / "data" / "photos").exists()


def test_a_folder_is_not_packed_into_itself(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(cv2.imencode(".png", np.zeros((6, 5, 3), np.uint8))[1])
    for inside in (tmp_path, tmp_path / "train"):
        with pytest.raises(UserError, match="is inside the folder to pack; choose another"):
            main(["prepare", "folder", str(tmp_path), "--name=mine", "--data-dir", str(inside)])
    assert [path.name for path in tmp_path.rglob("*")] == ["train", "cat", "0.png"]


def test_the_digits_are_prepared_by_name_too(tmp_path, capsys):
    main(["prepare", "digits", f"--data-dir={tmp_path}"])
    assert str(tmp_path / "digits") in capsys.readouterr().out
    assert len(open_source("digits", "train", str(tmp_path))) > 1000


def folder_of_images(root, *files):
    png = cv2.imencode(".png", np.zeros((6, 5, 3), np.uint8))[1].tobytes()
    for file in files:
        path = os.fsencode(root / "train") + b"/" + file
        os.makedirs(os.path.dirname(path), exist_ok=True)
        pathlib.Path(os.fsdecode(path)).write_bytes(png)


def test_only_leftovers_of_preparations_are_removed(tmp_path):
    """The data set may have the folder of the images: both are called pets."""
    folder_of_images(tmp_path / "pets", b"cat/0.png")
    kept = [tmp_path / "pets" / "incomplete.raw" / "notes.txt", tmp_path / "pets" / ".preparing" / "notes.txt"]
    gone = [tmp_path / "pets" / "incomplete.A1B2C3_1.0.0" / "x", tmp_path / "pets" / ".preparing-ab_c1" / "x"]
    for file in kept + gone:
        file.parent.mkdir()
        file.write_text("mine")
    main(["prepare", "folder", str(tmp_path / "pets"), f"--data-dir={tmp_path}"])
    assert all(file.exists() for file in kept) and not any(file.parent.exists() for file in gone)


def test_a_file_name_that_is_not_utf_8_is_packed(tmp_path, capsys):
    folder_of_images(tmp_path / "pets", b"cat/caf\xe9.png")
    main(["prepare", "folder", str(tmp_path / "pets"), f"--data-dir={tmp_path / 'data'}"])
    assert open_source("pets", "train", str(tmp_path / "data"))[0]["file_name"] == rb"train/cat/caf\xe9.png"


@pytest.mark.parametrize("split", ["all", "test set", "my.split", "val[1]"])
def test_a_split_that_could_not_be_read_back_is_refused_before_packing(split, tmp_path):
    folder_of_images(tmp_path / "pets", b"cat/0.png")
    shutil.copytree(tmp_path / "pets" / "train", tmp_path / "pets" / split)
    with pytest.raises(UserError, match=rf"^'{re.escape(split)}' cannot name a split; use letters, digits, _ and -"):
        main(["prepare", "folder", str(tmp_path / "pets"), f"--data-dir={tmp_path / 'data'}"])
    write_idx(tmp_path, split, IMAGES, LABELS)
    with pytest.raises(UserError, match="cannot name a split"):
        main(["prepare", "idx", str(tmp_path), "--name=mine", f"--data-dir={tmp_path / 'data'}"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            tarfile.ReadError("unexpected end of data"),
            "ReadError: unexpected end of data; an archive is damaged or inc",
        ),
        (RuntimeError("write() failed: No space left on device; x"), "OSError: No space left on device"),
        (None, None),
    ],
)
def test_what_tfds_cannot_prepare_is_one_line_and_a_part_of_imagenet_is_said(
    error, message, tmp_path, monkeypatch, capsys
):
    for name in prepare.IMAGENET:
        (tmp_path / name).write_bytes(b"")
    splits = {"train": types.SimpleNamespace(num_examples=3), "validation": types.SimpleNamespace(num_examples=50_000)}

    class Builder:
        name, data_dir, info = "imagenet2012", str(tmp_path), types.SimpleNamespace(splits={})

        def download_and_prepare(self, download_config):
            if error:
                raise error
            self.info.splits.update(splits)

    monkeypatch.setattr(prepare, "open_builder", lambda *arguments, **options: Builder())
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: name)
    run = lambda: prepare._prepare_tfds("imagenet2012", tmp_path, tmp_path, lambda folder: None)
    if error:
        with pytest.raises(UserError, match=f"^preparing imagenet2012 failed: {re.escape(message)}"):
            run()
    else:
        assert run() == tmp_path
        line = "warning: train has 3 examples, the official one 1,281,167; are the archives complete?\n"
        assert capsys.readouterr().err == line


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from hga_flax.__main__ import main
from hga_flax.errors import run_main
run_main(lambda: main(sys.argv[1:]))
"""


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path):
    folder_of_images(tmp_path / "pets", b"cat/0.png")
    arguments = ["prepare", "folder", str(tmp_path / "pets"), f"--data-dir={tmp_path / 'data'}"]
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: preparing pets in {tmp_path / 'data'} failed: File too large"
    assert [path.name for path in (tmp_path / "data" / "pets").iterdir()] == [".lock"]


def test_a_pipe_among_small_images_is_the_only_bad_image(tmp_path, capsys):
    folder_of_images(tmp_path / "pets", b"cat/0.png")
    os.mkfifo(tmp_path / "pets" / "train" / "cat" / "1.png")
    (tmp_path / "pets" / "train" / "cat" / "2.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((2, 3)))[1])
    main(["prepare", "folder", str(tmp_path / "pets"), f"--data-dir={tmp_path / 'data'}"])
    assert "1 of 3 images cannot be decoded" in capsys.readouterr().err
