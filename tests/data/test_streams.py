import itertools
import pickle

import jax
import numpy as np
import pytest

from hga_flax.data import streams

KINDS = (streams.PERMUTATION, streams.CIPHER)
NAMES = [value for name, value in vars(streams).items() if name.isupper() and value not in KINDS]


def test_every_stream_has_a_root_of_its_own():
    assert len(NAMES) == len(set(NAMES)) == 7
    roots = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in range(50)}
    keys = [jax.random.key_data(streams.stream(jax.random.key(s), n)).tolist() for s in range(50) for n in NAMES]
    assert len({*map(tuple, keys)} | roots) == 50 * (len(NAMES) + 1)


def test_steps_devices_epochs_and_examples_meet_in_no_key():
    """Dropout folds in (step, device), augmentation (epoch, index): from one root they would draw the same."""
    fold = lambda key, a, b: tuple(jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, a), b)).tolist())
    root = jax.random.key(0)
    keys = [fold(streams.stream(root, name), a, b) for name in NAMES for a, b in itertools.product(range(4), range(4))]
    assert len(set(keys)) == len(keys)


def test_numbers_for_the_host_do_not_add_up():
    seeds = {(s, e): streams.host_seed(s, streams.ORDER, e) for s in range(60) for e in range(60)}
    assert len(set(seeds.values())) == 3600 and all(0 <= seed < 2**32 for seed in seeds.values())
    assert streams.host_seed(1, "order", 11) != streams.host_seed(11, "order", 1)
    assert streams.host_seed(0, "order", 0) == 1229295407, "the order of every run's examples"


@pytest.mark.parametrize("count", [1_500, 50_000, 65_536, 250_000])
def test_orders_of_other_seeds_and_epochs_are_unrelated(count):
    """Over 1,500 to 10,000 places. Those of the cipher correlate by up to 0.9."""
    places = np.linspace(0, count, min(count, 10_000), endpoint=False).astype(int).tolist()
    orders = [streams.epoch_order(seed, epoch, count) for seed in (0, 1, 2) for epoch in (0, 1, 5)]
    between = np.corrcoef([[order(place) for place in places] for order in orders])[np.triu_indices(9, 1)]
    assert np.abs(between).max() < 5 / len(places) ** 0.5
    assert 0.7 < between.std() * len(places) ** 0.5 < 1.4


def test_an_order_is_a_permutation_which_no_version_may_change():
    order = streams.epoch_order(0, 0, 10)
    assert [order(place) for place in range(10)] == [4, 1, 5, 3, 7, 6, 9, 8, 2, 0]
    assert pickle.loads(pickle.dumps(order))(3) == order(3)  # worker processes get it
