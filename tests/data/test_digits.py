import numpy as np
from sklearn.datasets import load_digits

from hga_flax.data.digits import prepare_digits
from hga_flax.data.sources import open_source
from hga_flax.images.decoding import decode


def test_every_image_of_scikit_learn_is_in_exactly_one_split(tmp_path):
    digits = load_digits()
    expected = sorted(
        (int(label), np.round(image * 255 / 16).astype(np.uint8).tobytes())
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    found, sizes = [], {}
    for split in ("train", "test"):
        source = open_source("digits", split, str(tmp_path))
        records = [source[i] for i in range(len(source))]
        sizes[split] = len(records)
        found += [(r["label"], decode(r["image"], 1).tobytes()) for r in records]
        shares = np.bincount([r["label"] for r in records]) / len(records)
        assert abs(shares - np.bincount(digits.target) / len(digits.target)).max() < 0.01  # stratified
    assert sizes == {"train": 1500, "test": 297}
    assert sorted(found) == expected


def test_a_killed_preparation_is_not_taken_for_a_complete_one(tmp_path):
    leftover = tmp_path / "digits" / ".preparing-x" / "digits" / "1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "digits-train.array_record-00000-of-00001").write_bytes(b"half")
    assert len(open_source("digits", "train", str(tmp_path))) == 1500


def test_preparing_twice_writes_once(tmp_path):
    folder = prepare_digits(tmp_path)
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert prepare_digits(tmp_path) == folder
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before
