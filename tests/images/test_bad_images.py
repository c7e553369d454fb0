"""Real-world files: decoded where that is possible, else skipped, named once and counted, up to a limit."""

import itertools
import json

import numpy as np
import pytest

from configs import base
from hga_flax.data.pipeline import Dataset, Shard, create_dataset
from hga_flax.data.sources import DatasetInfo
from hga_flax.errors import UserError
from hga_flax.images.bad_images import BadImage, BadImages
from hga_flax.images.decoding import decode
from hga_flax.training.trainer import train
from tests.data.broken import BROKEN, JPEG, PHOTO, UNUSUAL
from tests.training import tiny

NAMES = [f"{i}-{name}" for i, name in zip(range(30), itertools.cycle(BROKEN), strict=False)]


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_decoded_properly(name):
    grey = np.repeat(PHOTO[..., :1], 3, axis=-1)
    upright = {"grey.jpg": grey, "sixteen.png": grey, "rotated.jpg": np.rot90(PHOTO, -1)}.get(name, PHOTO)
    pixels = decode(UNUSUAL[name], 3)
    assert pixels.shape == upright.shape and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - upright).mean() < (16 if name == "animated.gif" else 3)  # a GIF has a palette
    assert decode(UNUSUAL[name], 1).shape == (*upright.shape[:2], 1)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_broken_is_refused(name, channels):
    with pytest.raises(BadImage):
        decode(BROKEN[name], channels)


def test_a_jpeg_with_something_behind_its_end_is_whole():
    assert decode(JPEG + b"\0" * 100, 3).shape == PHOTO.shape


class Bytes:
    """A source of JPEGs of which some are broken."""

    def __init__(self, bad, count=12):
        self._bad, self._count = bad, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return {"image": b"" if index in self._bad else JPEG, "label": index, "file_name": f"{index}.jpg"}


def make_dataset(limit=100, cache_mb=0):
    data = base.get_config().data
    with data.unlocked():
        data.image_size, data.num_threads, data.augmentation = 8, 0, "none"
        data.max_bad_images, data.cache_mb = limit, cache_mb
    dataset = Dataset(DatasetInfo("x", 12, 3, ()), data, 0)
    dataset.bad_images.log = dataset.__dict__.setdefault("lines", []).append
    return dataset


def rows(dataset, bad, batches=9, start=0):
    taken = itertools.islice(dataset.train_batches(Bytes(bad), 4, Shard(), start), batches)
    return [tuple(row) for b in taken for row in zip(b["epoch"].tolist(), b["index"].tolist(), strict=True)]


@pytest.mark.parametrize("bad", [{3}, {0, 5, 7, 11}, set(range(11))])
def test_a_bad_image_is_replaced_by_the_next_good_one_and_moves_no_other(bad):
    whole, broken = rows(make_dataset(), set(), 20), rows(make_dataset(), bad)
    expected = [next(row for row in whole[position:] if row[1] not in bad) for position in range(36)]
    assert broken == expected
    assert rows(make_dataset(), bad, 4, start=20) == expected[20:]  # and resuming finds the same


def test_each_is_named_once_and_counted():
    dataset = make_dataset()
    rows(dataset, {3, 7})
    assert dataset.bad_images.found("train") == [3, 7]
    assert sorted(dataset.lines) == [f"skipped {i}.jpg: the file is empty or cannot be read" for i in (3, 7)]


def test_what_an_earlier_session_named_is_not_named_again():
    dataset = make_dataset()
    dataset.bad_images.remember("train", [3])
    rows(dataset, {3, 7})
    assert len(dataset.lines) == 1 and dataset.bad_images.found("train") == [3, 7]


@pytest.mark.parametrize("bad", [{1, 4, 7}, set(range(12))])
def test_more_than_the_limit_end_the_run_with_one_line(bad):
    with pytest.raises(UserError, match=r"more than data.max_bad_images=2 images of the split 'train'") as caught:
        rows(make_dataset(limit=2), bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_a_split_of_which_no_image_can_be_decoded_is_said_to_be_so(cache_mb):
    dataset = make_dataset(limit=100, cache_mb=cache_mb)
    with pytest.raises(UserError, match=r"^no image of the split 'train' can be decoded; some .* named above$"):
        rows(dataset, set(range(12)))
    assert dataset.lines and all("the file is empty or cannot be read" in line for line in dataset.lines)


def test_the_images_that_the_loader_gave_up_at_are_named():
    dataset = make_dataset(limit=2)
    with pytest.raises(UserError, match=r"more than data\.max_bad_images=2 .* are named above"):
        rows(dataset, set(range(12)))
    assert dataset.lines


def test_bad_images_are_booked_under_the_split_that_they_are_in():
    dataset = make_dataset()
    list(dataset.eval_batches(Bytes({2, 9}), 8, Shard(), "train"))
    assert (dataset.bad_images.found("train"), dataset.bad_images.found("validation")) == ([2, 9], [])


def test_the_limit_holds_each_time_that_a_split_is_read():
    dataset = make_dataset(limit=2)
    for _ in range(5):
        with pytest.raises(UserError, match=r"more than data\.max_bad_images=2"):
            list(dataset.eval_batches(Bytes({1, 4, 7}), 4, Shard()))


def test_as_many_as_the_limit_do_not():
    assert len(rows(make_dataset(limit=2), {1, 4})) == 36


def test_evaluation_masks_them_out():
    dataset = make_dataset()
    batches = list(dataset.eval_batches(Bytes({2, 9}), 8, Shard()))
    assert np.concatenate([b["mask"] for b in batches]).tolist() == [i not in (2, 9) and i < 12 for i in range(16)]
    assert dataset.bad_images.found("validation") == [2, 9] and len(dataset.lines) == 2


def test_the_ledger_counts_distinct_images_for_each_split():
    ledger, lines = BadImages(1), []
    ledger.log = lines.append
    batches = [{"bad": np.array([4, -1, 4])}, {"bad": np.array([-1, 4, -1])}]
    assert list(ledger.watch(iter(batches), "train", str)) == [{}, {}]
    list(ledger.watch(iter([{"bad": np.array([5])}]), "test", str))
    assert (ledger.found("train"), ledger.found("test"), lines) == ([4], [5], ["skipped 4", "skipped 5"])


def test_the_limit_is_that_of_all_processes_together():
    ledger = BadImages(2)
    ledger.share("train", [1, 5])
    assert ledger.found("train") == [1, 5]
    with pytest.raises(UserError, match=r"more than data.max_bad_images=2 images of the split 'train'"):
        ledger.share("train", [1, 5, 9])


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,000 images to train on of which 30 are broken, and one of each to evaluate on."""
    root = tmp_path_factory.mktemp("thousand")
    good = [(f"{i}-{name}", UNUSUAL[name]) for i, name in zip(range(970), itertools.cycle(UNUSUAL), strict=False)]
    good = [(name.replace(".gif", ".webp"), data) for name, data in good]  # the suffix lies
    for split, files in (
        ("train", good + [(name, BROKEN[name.split("-")[1]]) for name in NAMES]),
        ("val", list((UNUSUAL | BROKEN).items())),
    ):
        for i, (name, data) in enumerate(files):
            folder = root / split / ("ant" if i % 3 else "cat")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name.replace(".gif", ".webp")).write_bytes(data)
    return root


def config(root, **options):
    return tiny.config(
        **{
            "data__name": "folder",
            "data__dir": str(root),
            "data__fake": False,
            "data__eval_split": "validation",
            "data__mean": (0.5, 0.5, 0.5),
            "data__std": (0.25, 0.25, 0.25),
            "training__batch_size": 200,
            "training__steps": 5,
            "training__log_every_steps": 5,
        }
        | options
    )


@pytest.mark.medium
@pytest.mark.parametrize("cache_mb", [0, pytest.param(100, marks=pytest.mark.slow)])
def test_an_epoch_of_1000_images_of_which_30_are_broken(thousand, tmp_path, capsys, cache_mb):
    train(config(thousand, data__cache_mb=cache_mb), str(tmp_path))
    out = capsys.readouterr().out
    for name in NAMES:
        assert out.count(f"/{name}: the ") == 1
    assert out.count("skipped train/") == 30 and out.count("skipped val/") == len(BROKEN)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["train/bad_images"] for line in lines if "train/bad_images" in line} == {30}
    last = next(line for line in lines if "eval/bad_images" in line)
    assert (last["eval/bad_images"], last["eval/num_examples"]) == (len(BROKEN), len(UNUSUAL))


@pytest.mark.medium
def test_with_a_lower_limit_training_stops(thousand, tmp_path):
    with pytest.raises(UserError, match=r"more than data.max_bad_images=10 images of the split 'train'"):
        train(config(thousand, data__max_bad_images=10), str(tmp_path))


def test_a_folder_keeps_its_class_names_in_the_workdir(thousand):
    assert create_dataset(config(thousand).data, 0).info.class_names == ("ant", "cat")
