import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.models import pooling
from hga_flax.models.pooling import adaptive_average_pool, average_pool, max_pool
from tests.reference import sample

# What PyTorch's AvgPool2d gives for arange(1, n + 1) along one axis, from its documentation's formulas:
# (n, size, stride, margin, ceil, count_margin) -> averages.
LINES = [
    ((4, 2, 2, 0, False, True), [1.5, 3.5]),
    ((5, 2, 2, 0, False, True), [1.5, 3.5]),
    ((5, 2, 2, 0, True, False), [1.5, 3.5, 5.0]),
    ((1, 2, 2, 0, True, False), [1.0]),
    ((4, 3, 2, 1, False, True), [(0 + 1 + 2) / 3, (2 + 3 + 4) / 3]),
    ((4, 3, 1, 1, False, True), [(0 + 1 + 2) / 3, 2, 3, (3 + 4 + 0) / 3]),
    ((4, 3, 1, 1, False, False), [1.5, 2, 3, 3.5]),
    ((4, 3, 2, 1, True, True), [1, 3, (4 + 0) / 2]),  # the window reaches past the margin: two places count
    ((3, 2, 2, 1, True, True), [0.5, 2.5]),  # a third window would start behind the map
    ((1, 3, 2, 1, False, True), [1 / 3]),
]


@pytest.mark.parametrize(("arguments", "expected"), LINES, ids=str)
def test_windows_are_pytorchs(arguments, expected):
    n, size, stride, margin, ceil, count_margin = arguments
    line, expected = np.arange(1.0, n + 1), np.asarray(expected)
    x = np.multiply.outer(line, line)[None, :, :, None] * np.array([1.0, 10.0])
    y = average_pool(jnp.asarray(x, jnp.float32), size, stride, margin, ceil, count_margin)
    np.testing.assert_allclose(y[0, :, :, 1], 10 * np.multiply.outer(expected, expected), rtol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(7, 14), (3, 5), (1, 8), (9, 13)])
def test_adaptive_cells_are_pytorchs(height, width):
    x = sample((2, height, width, 3))
    y = np.asarray(adaptive_average_pool(jnp.asarray(x), 7))
    for i in range(7):
        for j in range(7):
            rows = slice(i * height // 7, -(-(i + 1) * height // 7))
            columns = slice(j * width // 7, -(-(j + 1) * width // 7))
            np.testing.assert_allclose(y[:, i, j], x[:, rows, columns].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)


def test_types():
    x = jnp.ones((1, 5, 5, 2), jnp.bfloat16)
    assert average_pool(x, 2, 2, ceil=True, count_margin=False).dtype == jnp.bfloat16
    assert adaptive_average_pool(x, 7).dtype == jnp.float32


SHAPES = {
    "resnet": ((3, 3), (2, 2), ((1, 1), (1, 1))),
    "googlenet, last partial window": ((3, 3), (2, 2), ((0, 1), (0, 0))),
    "googlenet, branch": ((3, 3), (1, 1), ((1, 1), (1, 1))),
    "apart": ((2, 2), (2, 2), "VALID"),
    "gaps": ((2, 1), (3, 2), "VALID"),
    "same": ((3, 2), (2, 3), "SAME"),
    "no strides": ((2, 2), None, "VALID"),
    "wide": ((12, 11), (1, 1), "SAME"),  # more positions than a byte numbers
}


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Takes the GPUs' form here."""
    monkeypatch.setattr(pooling.lax, "platform_dependent", lambda *arrays, cuda, **others: cuda(*arrays))


def result(function, x, name, weights):
    window, strides, padding = SHAPES[name]

    def loss(x):
        y = function(x, window, strides, padding)
        return (y * weights[: y.size].reshape(y.shape)).sum(), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(x)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_on_gpus_values_and_gradients_are_flaxs_in_float64_also_where_elements_tie(name, ties, as_on_gpus):
    random = np.random.RandomState(0)
    x = random.standard_normal((2, 13, 12, 3))
    x = np.maximum(np.round(x), 0) if ties else x  # half of a map after a ReLU is zero
    with jax.enable_x64(True):
        weights = jnp.asarray(random.standard_normal(2 * 13 * 12 * 3))
        ours, flaxs = (result(function, jnp.asarray(x), name, weights) for function in (max_pool, nn.max_pool))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flaxs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


def test_bfloat16_gradients_are_added_in_float32(as_on_gpus):
    """One element that is the largest of nine windows: its gradient is the rounded sum, not a sum of rounded ones."""
    x = jnp.zeros((1, 5, 5, 1), jnp.bfloat16).at[0, 2, 2, 0].set(1)
    weights = jnp.asarray([1] + 24 * [2**-8 + 2**-10], jnp.bfloat16)
    window = ((3, 3), (1, 1), ((1, 1), (1, 1)))
    gradient = jax.grad(lambda x: (max_pool(x, *window) * weights.reshape(1, 5, 5, 1)).sum().astype(jnp.float32))(x)
    assert gradient.dtype == jnp.bfloat16
    inside = np.asarray(weights.reshape(5, 5)[1:4, 1:4], np.float32).sum()
    assert gradient[0, 2, 2, 0] == jnp.asarray(inside, jnp.bfloat16)


def test_a_nan_stays_one(as_on_gpus):
    x = jnp.ones((1, 4, 4, 1)).at[0, 1, 1, 0].set(jnp.nan)
    assert jnp.isnan(max_pool(x, (2, 2), (2, 2))[0, 0, 0, 0]) and max_pool(x, (2, 2), (2, 2))[0, 1, 1, 0] == 1


@pytest.mark.parametrize(("platform", "scatters"), [("cpu", 0), ("tpu", 1), ("cuda", 0), ("rocm", 0)])
def test_which_form_a_platform_compiles(platform, scatters):
    loss = lambda x: (max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) ** 2).sum()
    text = jax.jit(jax.grad(loss)).trace(jnp.zeros((1, 8, 8, 4))).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("select_and_scatter") == scatters
