import pathlib

import cv2
import numpy as np
import pytest

from hga_flax.data.folder import FolderSource
from hga_flax.data.sources import dataset_info, open_source
from hga_flax.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Two classes of two images each to train on, one of them and an empty folder to validate on."""
    for split, name, count in (("train", "cat", 2), ("train", "ant", 2), ("val", "cat", 1), ("val", "ant", 0)):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for i, suffix in zip(range(count), (".JPG", ".webp"), strict=False):
            image = np.full((6, 5, 3), 40 * (i + 1) + len(name), np.uint8)
            (folder / f"{i}{suffix}").write_bytes(cv2.imencode(suffix.lower(), image)[1].tobytes())
        (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_a_source_with_its_class_names(root):
    info = dataset_info("folder", str(root))
    assert (info.num_classes, info.channels, info.class_names) == (2, 3, ("ant", "cat"))
    source = open_source("folder", "train", str(root))
    assert [(r["file_name"], r["label"]) for r in (source[i] for i in range(len(source)))] == [
        ("train/ant/0.JPG", 0),
        ("train/ant/1.webp", 0),
        ("train/cat/0.JPG", 1),
        ("train/cat/1.webp", 1),
    ]
    assert source[2]["image"] == (root / "train/cat/0.JPG").read_bytes()


@pytest.mark.parametrize("split", ["val", "validation"])
def test_validation_has_two_names(split, root):
    source = FolderSource(root, split)
    assert len(source) == 1 and source[0]["label"] == 1


def test_an_empty_class_is_warned_of_and_keeps_its_label(root, capsys):
    (root / "train" / "bee").mkdir()
    source = FolderSource(root, "train")
    assert {source[i]["label"] for i in range(4)} == {0, 2}
    assert "the class 'bee' has no images" in capsys.readouterr().err


def test_a_file_that_is_gone_reads_as_no_image(root):
    source = FolderSource(root, "train")
    (root / "train/ant/0.JPG").unlink()
    assert source[0]["image"] == b""


@pytest.mark.parametrize(
    ("prepare", "split", "message"),
    [
        (lambda root: None, "test", "no split 'test'; it has: train, val"),
        (lambda root: (root / "val" / "dog").mkdir(), "val", "the class 'dog', which"),
        (lambda root: (root / "val/cat/0.JPG").unlink(), "val", "holds no images"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(prepare, split, message, root):
    prepare(root)
    with pytest.raises(UserError, match=message):
        FolderSource(root, split)


def test_no_folder_at_all(tmp_path):
    for directory, message in (("", "name the folder"), (tmp_path / "x", "no such folder"), (tmp_path, "no split")):
        with pytest.raises(UserError, match=message):
            dataset_info("folder", str(directory))


@pytest.mark.parametrize("split", ["../other", "..", ".", "/etc", "train/cat"])
def test_no_split_leads_out_of_the_folder(split, root):
    (root.parent / "other" / "cat").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="has no split"):
        FolderSource(root, split)


def test_slices_and_sums_need_a_packed_data_set(root):
    for split in ("train[:90%]", "train+val"):
        with pytest.raises(UserError, match=r"^data\.train_split='train.*whole splits only \(train, val\); python -m"):
            open_source("folder", split, str(root), "data.train_split")
    with pytest.raises(UserError, match=r"^data\.eval_split='vall': .* did you mean 'val'\?; it has: train, val$"):
        open_source("folder", "vall", str(root), "data.eval_split")


def test_a_folder_that_cannot_be_read_is_one_line(root, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"data\.dir: cannot read .*: Permission denied"):
        FolderSource(root, "train")
