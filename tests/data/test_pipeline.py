import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest

from configs import base
from hga_flax.data import pipeline
from hga_flax.data.memory import MemorySource
from hga_flax.data.pipeline import Dataset, Shard, available_cores, create_dataset
from hga_flax.data.sources import DatasetInfo
from hga_flax.data.streams import CIPHER, ORDER, host_seed
from hga_flax.errors import UserError
from hga_flax.images.host_augmentation import host_transform

ALONE = Shard()


def make_dataset(examples=22, seed=3, threads=0, workers=0, cache_mb=0, augmentation="none"):
    data = base.get_config().data
    with data.unlocked():
        data.fake, data.fake_examples, data.image_size = True, examples, 8
        data.augmentation, data.num_threads = augmentation, threads
        data.num_workers, data.cache_mb = workers, cache_mb
    return Dataset(DatasetInfo("x", 10, 3, ()), data, seed)


def take(dataset, count, batch_size=4, shard=ALONE, start=0):
    return list(itertools.islice(dataset.train_batches(dataset.source("train"), batch_size, shard, start), count))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_orders_of_epochs_that_are_over_are_forgotten():
    """Each takes as many bytes as a few labels of the whole training set."""
    examples = pipeline._TrainExamples(range(5), None, None, 0, 0, 4, ALONE, 0)
    seen = [examples._place(position) for position in range(40)]
    assert [sorted(index for e, index in seen if e == epoch) for epoch in range(8)] == [list(range(5))] * 8
    assert sorted(examples._orders) == [6, 7]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_cores_that_this_process_may_not_use_do_not_count():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert 1 <= available_cores() <= len(cores)


def test_every_epoch_holds_every_example_once_in_a_new_order():
    batches = take(make_dataset(), 11)  # 44 examples: two epochs of 22, and a batch across their border
    index = np.concatenate([b["index"] for b in batches])
    epoch = np.concatenate([b["epoch"] for b in batches])
    assert sorted(index[:22]) == sorted(index[22:]) == list(range(22))
    assert (epoch == np.repeat([0, 1], 22)).all()
    assert (index[:22] != index[22:]).any() and (index[:22] != np.arange(22)).any()


def test_a_batch_holds_the_examples_that_its_index_names():
    dataset = make_dataset()
    source = dataset.source("train")
    for batch in take(dataset, 3):
        assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
        for image, label, index in zip(batch["image"], batch["label"], batch["index"], strict=True):
            np.testing.assert_array_equal(image, source[int(index)]["image"])
            assert label == source[int(index)]["label"]


@pytest.mark.medium
@pytest.mark.parametrize("augmentation", ["imagenet", "none"])
@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"threads": 4}, {"workers": 2}], ids=str)
def test_threads_and_worker_processes_change_nothing(options, augmentation):
    expected = take(make_dataset(augmentation=augmentation), 8)
    assert_same(take(make_dataset(augmentation=augmentation, **options), 8), expected)


@pytest.mark.parametrize("augmentation", ["imagenet", "none"])
def test_a_batch_that_threads_fill_piece_by_piece_is_whole(augmentation):
    dataset = make_dataset(augmentation=augmentation, threads=4)
    small = take(dataset, 51, 2)  # each in one piece
    joined = [{name: np.concatenate([b[name] for b in small[i : i + 17]]) for name in small[0]} for i in (0, 17, 34)]
    assert_same(take(dataset, 3, 34), joined)  # 17 pieces


@pytest.mark.parametrize("threads", [0, 2])
def test_keeping_images_in_memory_changes_nothing(threads):
    kept, read = make_dataset(cache_mb=1, threads=threads), make_dataset()
    assert isinstance(kept.source("train"), MemorySource) and not isinstance(read.source("train"), MemorySource)
    assert_same(take(kept, 8), take(read, 8))
    assert_same(*(list(d.eval_batches(d.source("test"), 8, ALONE)) for d in (kept, read)))


def test_a_broken_image_in_memory_is_skipped_as_elsewhere(capsys):
    class Broken:
        """The examples of a source, two of them undecodable."""

        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            return self.source[index] | ({"image": b"broken"} if index in (3, 20) else {})

    kept, read = make_dataset(cache_mb=1), make_dataset()
    for dataset in (kept, read):
        for split in ("train", "test"):
            dataset._opened[split] = Broken(dataset.open(split))
    assert isinstance(kept.source("train"), MemorySource) and not isinstance(read.source("train"), MemorySource)
    assert_same(take(kept, 11), take(read, 11))  # two epochs: batches with a broken image, and batches without
    assert_same(*(list(d.eval_batches(d.source("test"), 8, ALONE, "test")) for d in (kept, read)))
    assert kept.bad_images.found("train") == read.bad_images.found("train") == [3, 20]
    assert kept.bad_images.found("test") == read.bad_images.found("test") == [3, 20]


def test_the_order_of_older_runs_is_grains_shuffle_of_each_epoch():
    """Checkpoints of runs that began with it go on in it."""
    dataset = make_dataset()
    batches = dataset.train_batches(dataset.source("train"), 4, ALONE, 0, CIPHER)
    index = np.concatenate([batch["index"] for batch in itertools.islice(batches, 11)])
    for epoch in (0, 1):
        order = grain.MapDataset.range(22).shuffle(seed=host_seed(3, ORDER, epoch))
        assert index[22 * epoch : 22 * (epoch + 1)].tolist() == [int(order[place]) for place in range(22)]
    assert (np.concatenate([batch["index"] for batch in take(dataset, 11)]) != index).any()


def test_images_too_large_for_the_memory_stay_where_they_are():
    assert not isinstance(make_dataset(5209, cache_mb=1).source("train"), MemorySource)  # 192 bytes each
    assert isinstance(make_dataset(5208, cache_mb=1).source("train"), MemorySource)


@pytest.mark.medium
def test_worker_processes_evaluate_and_go_on_as_none_do():
    alone, workers = make_dataset(), make_dataset(workers=2)
    assert_same(*(list(d.eval_batches(d.source("test"), 8, ALONE)) for d in (workers, alone)))
    assert_same(take(workers, 3, start=20), take(alone, 8)[5:])


IN_A_GROUP = """
import os, sys
from tests.data.test_pipeline import ALONE, make_dataset
dataset = make_dataset(workers=1)
batches = dataset.train_batches(dataset.source("train"), 4, ALONE)
next(batches)
print("ready", flush=True)
sys.stdin.readline()
print([next(batches)["index"].shape for _ in range(20)] == [(4,)] * 20, flush=True)
sys.stdin.readline()
os._exit(0)  # as a kill does: nothing is closed
"""


@pytest.mark.medium
def test_workers_neither_hear_of_a_signal_nor_outlive_their_parent():
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_GROUP], stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        children = pathlib.Path(f"/proc/{parent.pid}/task").glob("*/children")
        workers = [int(pid) for file in children for pid in file.read_text().split()]
        assert len(workers) == 2  # and the tracker of shared memory
        for pid in workers:
            for signum in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, signum)
        parent.stdin.write("go on\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "True\n"
        _, error = parent.communicate("end\n", timeout=20)  # waits for all that could still write
    assert parent.returncode == 0 and "Traceback" not in error
    deadline = time.monotonic() + 10
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch_in_order(processes):
    whole = take(make_dataset(), 8)
    parts = [take(make_dataset(), 8, shard=Shard(p, processes)) for p in range(processes)]
    joined = [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("cut", [1, 5, 6, 9])
def test_going_on_at_any_place_equals_not_having_stopped(cut):
    assert_same(take(make_dataset(), 10 - cut, start=4 * cut), take(make_dataset(), 10)[cut:])


def test_the_seed_changes_the_order():
    assert (take(make_dataset(seed=4), 1)[0]["index"] != take(make_dataset(), 1)[0]["index"]).any()


def test_no_two_seeds_share_the_order_of_any_epoch():
    """Grain's own repeat adds the epoch to the seed: seed 1 in epoch 0 had the order of seed 0 in epoch 1."""
    orders = {}
    for seed in range(4):
        index = np.concatenate([b["index"] for b in take(make_dataset(20, seed=seed), 25)])  # five epochs
        orders |= {(seed, epoch): tuple(index[20 * epoch : 20 * epoch + 20].tolist()) for epoch in range(5)}
    assert len(set(orders.values())) == len(orders) == 20
    assert all(sorted(order) == list(range(20)) for order in orders.values())


@pytest.mark.parametrize(
    ("examples", "batch_size", "processes"), [(22, 4, 1), (22, 8, 4), (5, 8, 2), (8, 8, 8), (1, 8, 4)]
)
def test_evaluation_sees_every_example_once_whatever_the_batch_and_hosts(examples, batch_size, processes):
    dataset = make_dataset(examples)
    source = dataset.source("test")
    parts = [list(dataset.eval_batches(source, batch_size, Shard(p, processes))) for p in range(processes)]
    assert len({len(p) for p in parts}) == 1  # every process takes part in every step
    assert all(len(b["mask"]) == batch_size // processes for p in parts for b in p)
    seen = [img.tobytes() for p in parts for b in p for img, real in zip(b["image"], b["mask"], strict=True) if real]
    assert sorted(seen) == sorted(source[i]["image"].tobytes() for i in range(examples))


def test_create_dataset_reads_the_digits():
    data = base.get_config().data
    with data.unlocked():
        data.name, data.augmentation, data.image_size, data.num_threads = "digits", "small", 16, 2
    dataset = create_dataset(data, 0)
    batch = take(dataset, 1, batch_size=32)[0]
    assert batch["image"].shape == (32, 16, 16, 1)
    assert dataset.info.num_classes == 10


@pytest.mark.parametrize("augmentation", ["imagenet", "small"])
@pytest.mark.parametrize("cache_mb", [0, 10])
def test_evaluation_may_have_images_of_another_size(augmentation, cache_mb):
    dataset = dataclasses.replace(make_dataset(augmentation=augmentation, cache_mb=cache_mb), eval_size=12)
    plain = make_dataset(augmentation=augmentation, cache_mb=cache_mb)
    assert_same(take(dataset, 2), take(plain, 2))  # training does not notice
    source = dataset.source("train", train=False)
    batches = list(dataset.eval_batches(source, 8, ALONE))
    assert [b["image"].shape for b in batches] == [(8, 12, 12, 3)] * 3 and sum(b["mask"].sum() for b in batches) == 22
    transform = host_transform(plain.data, 3, train=False, seed=0, size=12)
    np.testing.assert_array_equal(batches[0]["image"][3], transform(plain.open("train")[3]["image"], 3, 0))
    assert isinstance(source, MemorySource) == (augmentation == "small" and cache_mb > 0)


def test_randaugment_is_drawn_anew_over_images_that_are_kept_in_memory():
    def batches(cache_mb, operations=2):
        dataset = make_dataset(augmentation="small", cache_mb=cache_mb)
        with dataset.data.unlocked():
            dataset.data.randaugment_ops = operations
        return take(dataset, 11)

    kept = batches(10)
    assert_same(kept, batches(0))
    images = {}
    for batch in kept:
        for index, image in zip(batch["index"], batch["image"], strict=True):
            images.setdefault(int(index), []).append(image)
    assert sum((a != b).any() for a, b in images.values()) > 11  # the two epochs differ
    assert any((a["image"] != b["image"]).any() for a, b in zip(kept, batches(10, 0), strict=True))


@pytest.mark.medium
@pytest.mark.parametrize(
    "options", [{"cache_mb": 64}, {}, {"threads": 2}, pytest.param({"workers": 1}, id="workers")], ids=str
)
def test_examples_without_labels_are_refused(options, monkeypatch):
    records = [{"image": np.zeros((8, 8, 3), np.uint8), "label": -1 if i == 5 else 9} for i in range(8)]
    monkeypatch.setattr(Dataset, "open", lambda self, split: records)
    dataset = make_dataset(**options)
    message = r"^the split 'test' has examples with the label -1, which is none of the 10 classes; unlabelled"
    with pytest.raises(UserError, match=message):
        list(dataset.eval_batches(dataset.source("test"), 4, ALONE, "test"))
    with pytest.raises(UserError, match="label -1"):
        take(dataset, 2)
