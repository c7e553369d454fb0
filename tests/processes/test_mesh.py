import numpy as np
import pytest

from hga_flax.errors import ConfigError
from hga_flax.processes import mesh as m
from tests.training import tiny


def test_the_mesh_holds_all_devices_along_data():
    assert dict(m.create_mesh().shape) == {"data": 8}


def test_batches_are_split_in_order_and_none_is_lost():
    batches = [{"x": np.arange(16) + 100 * i} for i in range(3)]
    placed = list(m.to_devices(iter(batches), tiny.mesh(8)))
    assert len(placed) == 3
    for ours, batch in zip(placed, batches, strict=True):
        np.testing.assert_array_equal(ours["x"], batch["x"])
        assert [s.data.shape for s in ours["x"].addressable_shards] == [(2,)] * 8
    assert list(m.to_devices(iter([]), tiny.mesh(8))) == []


def test_one_batch_is_placed_ahead_of_its_use():
    drawn = []

    def batches():
        for i in range(4):
            drawn.append(i)
            yield {"x": np.zeros(8)}

    stream = m.to_devices(batches(), tiny.mesh(8))
    next(stream)
    assert drawn == [0, 1]


def test_replicate_copies_to_every_device():
    tree = m.replicate({"a": np.arange(3.0)}, tiny.mesh(4))
    assert tree["a"].sharding.is_fully_replicated and len(tree["a"].addressable_shards) == 4
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])


def test_an_uneven_batch_is_refused_with_the_nearest_even_ones():
    m.check_batch_size("training.batch_size", 16, 8)
    with pytest.raises(ConfigError, match=r"training.batch_size=20: does not divide over 8 devices; try 16 or 24"):
        m.check_batch_size("training.batch_size", 20, 8)
