import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.training.ema import decay_at, update_ema


def test_the_decay_warms_up_to_its_value():
    steps = [0, 1, 90, 10**6]
    ours = [float(decay_at(0.9, jnp.asarray(t))) for t in steps]
    assert ours == pytest.approx([0.1, 2 / 11, 0.9, 0.9])
    assert float(decay_at(0.9999, jnp.asarray(10**6))) == pytest.approx(0.9999)


def test_an_average_of_a_constant_is_that_constant_and_forgets_where_it_began():
    ema, new = {"w": jnp.full(3, 100.0)}, {"w": jnp.full(3, 2.0)}
    left = 98.0
    for t in range(50):
        ema = update_ema(ema, new, 0.999, jnp.asarray(t))
        left *= (1 + t) / (10 + t)
        np.testing.assert_allclose(ema["w"], 2 + left, rtol=1e-5)
    assert left < 1e-4  # without the warm-up 0.95 of it would be left
