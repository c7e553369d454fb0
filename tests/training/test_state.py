import jax
import numpy as np
import optax
import pytest

from hga_flax.config.loading import build_model
from hga_flax.errors import ConfigError
from hga_flax.training.optimizer import create_optimizer
from hga_flax.training.state import abstract_state, create_state, make_init
from tests.training import tiny


def init(shape=(8, 8, 1), **overrides):
    c = tiny.config(**overrides)
    return make_init(build_model(c, 10), create_optimizer(c, optax.constant_schedule(0.1)), shape)


def test_the_abstract_state_is_the_state_without_its_values():
    abstract, state = abstract_state(init(), tiny.mesh(8)), create_state(init(), 0, tiny.mesh(8))
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), tree)
    assert shapes(abstract) == shapes(state)
    assert int(state.step) == 0 and int(state.metrics.loss.count) == 0


def test_the_seed_alone_decides_the_weights():
    draw = lambda seed, devices: jax.tree.leaves(create_state(init(), seed, tiny.mesh(devices)).params)
    assert all(np.array_equal(a, b) for a, b in zip(draw(0, 1), draw(0, 8), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(draw(0, 1), draw(1, 1), strict=True))


def test_options_that_the_network_refuses_are_a_config_error():
    with pytest.raises(ConfigError, match=r"config\.model cannot be built: .*odd"):
        abstract_state(init(model__attention_options="kernels=(2,)"), tiny.mesh())
