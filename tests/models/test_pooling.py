import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.models.pooling import adaptive_average_pool, average_pool
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
