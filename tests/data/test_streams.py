import itertools

import jax

from hga_flax.data import streams

NAMES = [value for name, value in vars(streams).items() if name.isupper()]


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
