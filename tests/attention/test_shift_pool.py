import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention.shift_pool import cell_edges, coarsen, pooled_convolutions, shifted_cells, stack_kernels
from tests.attention import naive


def test_cells_cover_the_axis_by_the_adaptive_rule():
    assert cell_edges(8, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert cell_edges(7, 2) == [(0, 4), (3, 7)]  # overlaps by one
    assert cell_edges(3, 4) == [(0, 1), (0, 2), (1, 3), (2, 3)]  # fewer positions than cells


def test_shifted_cells_count_only_positions_inside_the_map():
    matrix = shifted_cells(4, 2, 1)
    assert matrix.shape == (2, 3, 4)
    np.testing.assert_array_equal(matrix[0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(matrix[1], [[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]])


def test_coarsen_averages_the_cells_of_a_finer_grid():
    cells = jnp.arange(16.0).reshape(1, 16, 1)
    np.testing.assert_allclose(coarsen(cells, 4, 2)[0, :, 0], [2.5, 4.5, 10.5, 12.5])


@pytest.mark.parametrize("size", [(8, 12), (7, 7), (9, 5), (2, 1)])
@pytest.mark.parametrize(("kernels", "group_size"), [((1, 3, 5, 7), 1), ((3,), 2), ((9, 1), 4)])
@pytest.mark.parametrize("bins", [(1, 2, 4), (3, 6)])
def test_equals_pooling_after_convolving_in_float64(size, kernels, group_size, bins):
    random = np.random.RandomState(0)
    z = random.standard_normal((2, *size, 4))
    weights = [random.standard_normal((k, k, group_size, 4)) / k for k in kernels]
    expected = np.stack([naive.pool(naive.convolve(z, w), bins) for w in weights], axis=1)
    stacked = stack_kernels([jnp.asarray(w, jnp.float32) for w in weights])
    ours = jax.jit(pooled_convolutions, static_argnums=2)(jnp.asarray(z, jnp.float32), stacked, bins)
    assert ours.shape == expected.shape
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected)
