import os
import pathlib
import shutil

import cv2
import numpy as np
import pytest

from hga_flax.data.folder import FolderSource, class_names, packable_splits
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


def test_the_digest_is_of_names_and_labels(root):
    first = FolderSource(root, "train").digest
    shutil.copytree(root, root.parent / "moved")
    assert FolderSource(root.parent / "moved", "train").digest == first
    (root / "train/ant/0.JPG").rename(root / "train/cat/2.JPG")
    assert FolderSource(root, "train").digest != first


def test_a_name_that_only_looks_the_same_is_said_to_be_another(root):
    (root / "train" / "caf\u00e9").mkdir()
    (root / "val" / "cafe\u0301").mkdir()
    with pytest.raises(UserError, match="/train does not have; its name is spelled with other Unicode characters"):
        FolderSource(root, "val")


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
    os.mkfifo(root / "train/ant/0.JPG")
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


def add(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((root / "train/ant/0.JPG").read_bytes())


def test_images_of_every_kind_and_in_sub_folders_are_read_and_the_rest_is_counted_once(root, capsys):
    add(root, *(f"train/ant/{name}" for name in ("x.bmp", "y.tif", "z.jfif", "sub/a.jpg", "sub/deep/b.gif")))
    add(root, "train/ant/sub/raw.cr2", "train/ant/sub/raw2.cr2", "train/loose.png", "train/labels.csv")
    source = FolderSource(root, "train")
    names = [source[i]["file_name"].removeprefix("train/ant/") for i in range(len(source)) if not source[i]["label"]]
    assert names == ["0.JPG", "1.webp", "x.bmp", "y.tif", "z.jfif", "sub/a.jpg", "sub/deep/b.gif"]
    assert capsys.readouterr().err.splitlines() == [
        f"ignored 5 files that are not images in {root}/train: 2 .cr2, 2 .txt, 1 .csv",
        f"ignored 1 image directly in {root}/train, outside the class folders",
    ]


@pytest.mark.parametrize("litter", ["__MACOSX", "@eaDir", ".ipynb_checkpoints", "$RECYCLE.BIN", "lost+found"])
def test_what_systems_leave_behind_is_no_class_and_no_split(litter, root):
    add(root, f"train/{litter}/0.jpg", f"val/{litter}/0.jpg", f"{litter}/ant/0.jpg")
    assert dataset_info("folder", str(root)).class_names == ("ant", "cat")
    assert len(FolderSource(root, "train")) == 4 and len(FolderSource(root, "val")) == 1
    assert packable_splits(root) == ["train", "val"]


def test_a_folder_beside_the_splits_is_left_out_of_a_packed_set_and_named(root, capsys):
    add(root, "raw/0.jpg", "docs/figures/0.jpg", "extra/cat/0.jpg", "test/unlabelled.jpg")
    assert packable_splits(root) == ["extra", "train", "val"]
    assert [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"ignored the folder {root / name}" for name in ("docs", "raw", "test")
    ]


def test_a_folder_without_train_serves_what_it_has(root):
    (root / "train").rename(root / "test")
    shutil.rmtree(root / "val")
    assert class_names(root) == ("ant", "cat") and packable_splits(root) == ["test"]
    assert len(FolderSource(root, "test")) == 4
    assert [r["label"] for r in FolderSource(root, "test", classes=("ant", "cat"))][:4] == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"^data\.train_split='train': .* no split 'train'; it has: test$"):
        FolderSource(root, "train", "data.train_split")


def test_class_folders_that_lie_in_no_split_are_said_to(root):
    with pytest.raises(UserError, match=r"no split 'train': 'ant', 'cat' hold images, like class folders; move"):
        class_names(root / "train")


def test_the_classes_of_a_run_decide_the_labels(root, capsys):
    assert FolderSource(root, "val", classes=("ant", "cat"))[0]["label"] == 1
    add(root, "train/aaa new/0.jpg")  # evaluation goes on, with the labels of the run
    assert FolderSource(root, "val", classes=("ant", "cat"))[0]["label"] == 1
    assert "train has classes that the run does not know: 'aaa new'" in capsys.readouterr().err
    assert FolderSource(root, "val", classes=("cat", "ant"))[0]["label"] == 0  # as it was saved, whatever the order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: add(root, "train/new/0.jpg", "val/new/0.jpg"), "val has 3 classes, the run 2: it adds 'new'"),
        (
            lambda root: [(root / split / "ant").rename(root / split / "zebra") for split in ("train", "val")],
            "val has 2 classes, the run 2: it adds 'zebra' and it lacks 'ant'",
        ),
        (
            lambda root: [shutil.rmtree(root / split / "ant") for split in ("train", "val")],
            "val has 1 class, the run 2: it lacks 'ant'; make an empty folder for a class without images",
        ),
    ],
)
def test_a_folder_with_other_classes_than_the_run_is_refused_by_name(change, message, root):
    change(root)
    with pytest.raises(UserError) as caught:
        FolderSource(root, "val", classes=("ant", "cat"))
    assert str(caught.value) == f"{root}/{message}"
