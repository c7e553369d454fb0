import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import NonLocal
from tests.reference import applied, batch_norm, dense, parameter_count, relative_error, sample, softmax


@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_equations(scaled):
    x = sample((2, 3, 4, 16))
    y, params, statistics = applied(NonLocal(16, ratio=4, scaled=scaled), x)
    positions = x.reshape(2, 12, 16)
    query, key, value = (dense(positions, params[name]) for name in ("query", "key", "value"))
    mixed = np.zeros_like(value)
    for b in range(2):
        for i in range(12):
            products = np.array([query[b, i] @ key[b, j] for j in range(12)]) * (0.25 if scaled else 1)
            mixed[b, i] = softmax(products, axis=0) @ value[b]
    z = batch_norm(dense(mixed, params["restore"]), params["norm"], statistics["norm"])
    assert relative_error(y, x + z.reshape(x.shape)) < 1e-5


def test_starts_as_the_identity():
    x = jnp.asarray(sample((1, 3, 3, 8)), jnp.float32)
    y, _ = NonLocal(8).init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)


def test_cost_formula():
    hidden = 256 // 8
    expected = 4 * 256 * hidden + 3 * hidden + 256 + 2 * 256
    assert parameter_count(NonLocal(256), (1, 2, 2, 256)) == expected


def test_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match=r"NonLocal\(8\)"):
        applied(NonLocal(8), np.zeros((1, 2, 2, 4)))
