import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.attention.operator import with_gradient_apart
from hga_flax.config.loading import build_model
from hga_flax.errors import ConfigError
from hga_flax.training import state
from hga_flax.training.optimizer import create_optimizer
from hga_flax.training.state import abstract_state, create_state, make_init
from tests.training import tiny


def init(shape=(8, 8, 1), **overrides):
    c = tiny.config(**overrides)
    return make_init(build_model(c, 10), create_optimizer(c, optax.constant_schedule(0.1)), shape)


def test_the_abstract_state_is_the_state_without_its_values():
    abstract, drawn = abstract_state(init(), tiny.mesh(8)), create_state(init(), 0, tiny.mesh(8))
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), tree)
    assert shapes(abstract) == shapes(drawn)
    assert int(drawn.step) == 0 and int(drawn.metrics.loss.count) == 0


def test_the_seed_alone_decides_the_weights():
    draw = lambda seed, devices: jax.tree.leaves(create_state(init(), seed, tiny.mesh(devices)).params)
    assert all(np.array_equal(a, b) for a, b in zip(draw(0, 1), draw(0, 8), strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(draw(0, 1), draw(1, 1), strict=True))


@pytest.mark.medium
@pytest.mark.parametrize("overrides", [{}, {"training__ema_decay": 0.9}, {"optimizer__name": "adamw"}], ids=str)
def test_on_cpus_the_state_is_that_of_the_program_compiled_as_a_whole(overrides):
    make = init(**overrides)
    ours, whole = create_state(make, 3, tiny.mesh(2)), jax.jit(make)(jax.random.key(3))
    assert jax.tree.structure(ours) == jax.tree.structure(whole)
    for a, b in zip(*map(jax.tree.leaves, (ours, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert a.dtype == b.dtype


def test_a_parameter_drawn_with_a_function_of_its_own_derivative_is_drawn():
    """JAX's operations for such functions take the function itself."""

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            start = lambda key, shape: jax.nn.relu6(jax.nn.silu(with_gradient_apart(jax.random.normal(key, shape))))
            return x * self.param("gate", start, (x.shape[-1],))

    make = make_init(Attention(), optax.sgd(0.1), (2, 2, 3))
    ours, whole = create_state(make, 0, tiny.mesh(1)).params["gate"], jax.jit(make)(jax.random.key(0)).params["gate"]
    np.testing.assert_allclose(ours, whole, rtol=1e-6)


def test_the_next_seed_compiles_nothing():
    create_state(init(), 0, tiny.mesh(1))
    made = lambda: [cached.cache_info() for cached in (state._compiled, state._draw)]
    before = made()
    create_state(init(), 1, tiny.mesh(1))
    assert all(now.misses == then.misses and now.hits > then.hits for now, then in zip(made(), before, strict=True))


def test_options_that_the_network_refuses_are_a_config_error():
    with pytest.raises(ConfigError, match=r"config\.model cannot be built: .*odd"):
        abstract_state(init(model__attention_options="kernels=(2,)"), tiny.mesh())


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_draws_of_any_shape_kind_and_length_are_those_of_a_compiled_program(kind):
    def make(key):
        key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl=kind) if kind == "rbg" else key
        draws = {
            "normal": jax.random.normal(key, (5, 3)),
            "long": jax.random.normal(key, (7, 10007)),
            "longer than any of the fixed lengths": jax.random.uniform(key, (70000, 2), minval=-3.0, maxval=5.0),
            "truncated": jax.random.truncated_normal(key, -1.5, 0.5, (1, 6, 2)),
            "bfloat16": jax.random.uniform(key, (9,), jnp.bfloat16),
            "scalar": jax.random.normal(key, ()),
            "limits of their own": jax.random.uniform(key, (2, 3), minval=jnp.arange(3.0), maxval=5.0),
            "of several keys": jax.vmap(lambda key: jax.random.normal(key, (4,)))(jax.random.split(key, 3)),
            "of one key each": jax.vmap(jax.random.normal, in_axes=None, axis_size=2)(key),
            "integers": jax.random.randint(key, (4,), 0, 9),
            "inverse": jax.lax.erf_inv(jax.random.uniform(key, (3, 2))),
        }
        return draws | {"spread": jnp.broadcast_to(draws["normal"][:, None], (5, 2, 3)), "filled": jnp.full((2, 2), 7)}

    key = jax.random.key(5)
    ours, whole = state._evaluate(make, key), jax.jit(make)(key)
    for name, value in whole.items():
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype, name
        np.testing.assert_allclose(ours[name], value, rtol=2e-6, atol=1e-6, err_msg=name)


def test_a_function_that_only_has_the_name_of_a_draw_is_not_taken_for_it():
    @jax.jit
    def _uniform(key):
        return jnp.arange(4.0) + jax.random.uniform(key, (4,))

    @functools.partial(jax.jit, static_argnums=1)
    def _normal(key, shape):
        return 2.0 * jax.random.normal(key, shape)

    @jax.jit
    def _truncated_normal(mean=3.0):
        return mean * jnp.ones(2)

    @jax.jit
    def other(first, key, *more):
        return jax.random.normal(key, (2,)) + first + sum(more)

    @jax.jit
    def new_key(key):
        return jax.random.fold_in(key, 1)

    other.__wrapped__.__name__ = new_key.__wrapped__.__name__ = "_normal"

    def make(key):
        drawn = _uniform(key), _normal(key, (3, 2)), _truncated_normal(), _truncated_normal(4.0)
        more = jax.jit(other.__wrapped__), jax.jit(new_key.__wrapped__)
        return *drawn, more[0](2.0, key), more[0](2.0, key, 3.0, 4.0), jax.random.uniform(more[1](key), (3,))

    key = jax.random.key(7)
    for ours, whole in zip(state._evaluate(make, key), jax.jit(make)(key), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=2e-6)


def test_a_network_of_many_shapes_needs_few_programs():
    state._compiled.cache_clear()
    state._draw.cache_clear()
    create_state(init(model__name="cifar_resnet20", model__options=""), 0, tiny.mesh(1))
    assert state._compiled.cache_info().misses + state._draw.cache_info().misses <= 8  # 60 draws of 25 shapes
