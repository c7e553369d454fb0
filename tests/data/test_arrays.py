import gzip
import io
import struct
import zipfile

import numpy as np
import pytest

from hga_flax.data.arrays import read_idx, read_idx_file, read_npz
from hga_flax.errors import UserError

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 4, 3)).astype(np.uint8)
LABELS = np.array([0, 2, 1, 2, 0], np.uint8)


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, prefix, images, labels, compress=False):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        name, data = f"{prefix}-{kind}-ubyte", idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(data) if compress else data)


def test_idx_plain_and_compressed(tmp_path):
    write_idx(tmp_path, "train", IMAGES, LABELS)
    write_idx(tmp_path, "t10k", IMAGES[:2], LABELS[:2], compress=True)
    read = read_idx(tmp_path, ("a", "b", "c"))
    assert read.shape == (4, 3, 1) and read.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(read.splits["train"][0][..., 0], IMAGES)
    np.testing.assert_array_equal(read.splits["test"][1], [0, 2])


@pytest.mark.parametrize(
    "data", [b"", b"\x1f\x8bhalf", idx(IMAGES)[:-1], idx(IMAGES) + b"x", b"\0\0\x0d\1" + idx(IMAGES)[4:]]
)
def test_a_file_that_is_not_idx_is_named(data, tmp_path):
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(data)
    with pytest.raises(UserError, match="train-images-idx3-ubyte cannot be read"):
        read_idx_file(file)


@pytest.mark.parametrize("names", [("x_train", "y_train"), ("train_images", "train_labels"), ("images", "labels")])
def test_npz_by_the_names_in_use(names, tmp_path):
    colour = np.repeat(IMAGES[..., None], 3, axis=-1)
    np.savez(tmp_path / "a.npz", **dict(zip(names, (colour, LABELS[:, None]), strict=True)))
    read = read_npz(tmp_path / "a.npz")
    assert list(read.splits) == ["train"] and read.shape == (4, 3, 3) and read.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(read.splits["train"][1], LABELS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": IMAGES}, "it holds: a"),
        ({"images": IMAGES / 255, "labels": LABELS}, "must be uint8"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "5 whole numbers"),
        ({"images": IMAGES, "labels": LABELS - 1.0}, "whole numbers"),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])},
            "2 class names, but the labels go up to 2",
        ),
        ({"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b", "a"])}, "same name"),
        ({"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", " ", "c"])}, "' ' cannot name a class"),
        ({"images": IMAGES, "labels": LABELS, "class_names": np.array([b"\xff", b"a", b"b"])}, "not UTF-8"),
        ({"images": IMAGES, "labels": LABELS + 1}, r"the labels are 1 to 3, and none is 0: subtract 1 from them"),
        ({"images": IMAGES, "labels": LABELS + 1, "class_names": np.array(list("abc"))}, "none is 0: subtract 1"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "the split 'train' holds no images; leave it out"),
        ({"images": IMAGES, "labels": np.array(3)}, "5 whole numbers"),
        ({"images": IMAGES, "labels": LABELS[:0]}, "5 whole numbers"),
        ({"images": IMAGES, "labels": np.eye(3, dtype=np.uint8)[LABELS]}, "5 whole numbers"),
        (
            {"images": IMAGES, "labels": LABELS, "x_test": IMAGES[:0], "y_test": LABELS[:0]},
            "the split 'test' holds no images; leave it out",
        ),
        ({"images": IMAGES, "labels": LABELS.astype(np.int64) * 10**9}, "labels go up to 2,000,000,000.* from 0 to 2$"),
        ({"x_train": IMAGES, "x_test": IMAGES, "y_test": LABELS}, "holds x_train but no y_train"),
        ({"images": IMAGES, "labels": LABELS, "y_val": LABELS}, "holds y_val but no x_val"),
        ({"images": IMAGES, "labels": LABELS, "x_train": IMAGES, "y_train": LABELS}, "the split 'train' twice"),
        ({"images": IMAGES, "labels": LABELS.astype(np.int64) - 1}, "int64 .5., -1 to 1; they must be 5 whole"),
        (
            {"images": IMAGES, "labels": LABELS.astype(np.uint64) - 1},
            "uint64 .5., 0 to 18446744073709551615; they must",
        ),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, "it holds Python objects; save arrays of numbers"),
        ({"images": IMAGES, "labels": LABELS, "x_test": IMAGES[:, :2], "y_test": LABELS}, "different shapes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_npz(tmp_path / "a.npz")


def test_archives_that_numpy_cannot_read_are_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
    for data, message in ((b"text", "images is not an array"), (header.getvalue(), "cannot be read as .npz")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy" if data != b"text" else "images", data)
        with pytest.raises(UserError, match=message):
            read_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=IMAGES)
    data = (tmp_path / "a.npz").read_bytes()
    local, central = data.index(b"PK\3\4"), data.index(b"PK\1\2")
    for bit, method in ((1, 0), (0, 99)):  # encrypted; compressed in a way that Python does not know
        changed = bytearray(data)
        changed[local + 6] |= bit
        changed[central + 8] |= bit
        changed[local + 8] = changed[central + 10] = method
        (tmp_path / "a.npz").write_bytes(changed)
        with pytest.raises(UserError, match=r"cannot be read as \.npz: "):
            read_npz(tmp_path / "a.npz")


def test_a_text_is_not_called_an_archive(tmp_path):
    (tmp_path / "a.npz").write_text("hello")
    with pytest.raises(UserError, match="it is not a NumPy archive"):
        read_npz(tmp_path / "a.npz")


def test_arrays_that_are_no_part_of_a_split_are_named(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS, x_extra=IMAGES)
    assert list(read_npz(tmp_path / "a.npz").splits) == ["train"]
    assert capsys.readouterr().err == f"ignored in {tmp_path / 'a.npz'}: 'x_extra'\n"


def test_idx_files_by_their_other_names_and_copies_beside_them(tmp_path):
    write_idx(tmp_path, "train", IMAGES, LABELS)
    for end in (".gz.1", ".bak", ".old"):  # second downloads and backups
        (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(idx(255 - IMAGES))
    write_idx(tmp_path, "train", IMAGES, LABELS, compress=True)
    for kind in ("images.idx3", "labels.idx1"):
        source = f"train-{kind.replace('.', '-')}-ubyte"
        (tmp_path / f"t10k-{kind}-ubyte").write_bytes((tmp_path / source).read_bytes())
    found = read_idx(tmp_path)
    assert list(found.splits) == ["test", "train"]
    for images, labels in found.splits.values():
        assert (images[..., 0] == IMAGES).all() and (labels == LABELS).all()
    write_idx(tmp_path, "t10k", IMAGES, LABELS)
    with pytest.raises(UserError, match=r"the images of 'test' twice; t10k-images\.idx3-ubyte is the second"):
        read_idx(tmp_path)


@pytest.mark.parametrize("names", [np.array([b"ant", b"bee", b"cat"]), np.array(["ant", "bee", "cat"])])
def test_names_may_be_bytes(names, tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS, class_names=names)
    assert read_npz(tmp_path / "a.npz").class_names == ("ant", "bee", "cat")


def test_a_class_without_images_is_said(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS + 1)
    assert read_npz(tmp_path / "a.npz", ("none", "a", "b", "c")).splits["train"][1].tolist() == [1, 3, 2, 3, 1]
    np.savez(tmp_path / "b.npz", images=IMAGES, labels=LABELS * 2)
    assert len(read_npz(tmp_path / "b.npz").class_names) == 5
    said = "warning: {}: 'train' has no images of {}"
    assert capsys.readouterr().err.splitlines() == [
        said.format(tmp_path / "a.npz", "'none'"), said.format(tmp_path / "b.npz", "'1', '3'"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["images.npy", "images.npz"])
def test_a_lone_array_needs_its_labels(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(UserError, match=r"holds one array, uint8 \[5, 4, 3\], and no labels; save both in one file"):
        read_npz(tmp_path / name)


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\3\4half")
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(UserError, match="no IDX files"):
        read_idx(tmp_path)
    (tmp_path / "x-images-idx3-ubyte").write_bytes(idx(IMAGES))
    with pytest.raises(UserError, match="no labels next to it"):
        read_idx(tmp_path)
