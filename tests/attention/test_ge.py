import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import GatherExcite, SqueezeExcitation
from hga_flax.attention.ge import upsampled
from tests.reference import (
    applied,
    batch_norm,
    convolution,
    dense,
    parameter_count,
    relative_error,
    relu,
    sample,
    sigmoid,
)


def excited(cells, params):
    return dense(relu(dense(cells, params["squeeze"])), params["excite"])


def nearest(cells, height, width):
    grid = [
        [cells[:, i * cells.shape[1] // height, j * cells.shape[2] // width] for j in range(width)]
        for i in range(height)
    ]
    return np.moveaxis(np.array(grid), 2, 0)


def test_default_is_squeeze_and_excitation():
    x = jnp.asarray(sample((2, 4, 4, 32)), jnp.float32)
    se = SqueezeExcitation(32)
    variables = se.init(jax.random.key(0), x)
    np.testing.assert_array_equal(GatherExcite(32).apply(variables, x), se.apply(variables, x))


@pytest.mark.parametrize("mlp", [True, False])
def test_mean_gather_of_an_extent(mlp):
    x = sample((2, 7, 6, 16))
    y, params, _ = applied_parameterless(GatherExcite(16, ratio=4, extent=2, mlp=mlp), x)
    cells = np.zeros((2, 4, 3, 16))
    for i in range(4):
        for j in range(3):
            rows, columns = slice(max(0, 2 * i - 1), 2 * i + 2), slice(max(0, 2 * j - 1), 2 * j + 2)
            cells[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    cells = excited(cells, params) if mlp else cells
    assert relative_error(y, x * sigmoid(nearest(cells, 7, 6))) < 1e-6


def applied_parameterless(module, x):
    if module.mlp or module.learned:
        return applied(module, x)
    return np.asarray(module.apply({}, jnp.asarray(x, jnp.float32))), {}, {}


def test_learned_gather_of_an_extent():
    x = sample((1, 8, 6, 8))
    y, params, statistics = applied(GatherExcite(8, ratio=2, extent=4, learned=True), x)
    cells = x
    for i in (1, 2):
        cells = convolution(cells, params[f"gather_conv{i}"]["kernel"], stride=2, margin=1, groups=8)
        cells = batch_norm(cells, params[f"gather_norm{i}"], statistics[f"gather_norm{i}"])
        cells = relu(cells) if i == 1 else cells
    assert relative_error(y, x * sigmoid(nearest(excited(cells, params), 8, 6))) < 1e-5


def test_learned_global_gather_is_one_weighted_sum_and_ties_the_size():
    x = sample((2, 3, 4, 8))
    module = GatherExcite(8, learned=True, mlp=False)
    y, params, statistics = applied(module, x)
    cells = (x * params["gather_conv1"]["kernel"][:, :, 0, :]).sum(axis=(1, 2))
    cells = batch_norm(cells, params["gather_norm1"], statistics["gather_norm1"])
    assert relative_error(y, x * sigmoid(cells)[:, None, None, :]) < 1e-5
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 3, 4, 8)))
    with pytest.raises(ValueError, match=r"initialised for maps of \(3, 4\), not \(5, 4\)"):
        module.apply(variables, jnp.zeros((1, 5, 4, 8)))


def test_upsampling_reads_the_cell_that_covers_a_position():
    cells = jnp.arange(3.0).reshape(1, 3, 1, 1)
    assert upsampled(cells, 7, 1)[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 2, 2]  # floor(i * 3 / 7)


def test_cost_formula():
    channels, hidden = 256, 16
    mlp = 2 * channels * hidden + hidden + channels
    assert parameter_count(GatherExcite(channels), (1, 8, 8, channels)) == mlp
    assert (
        parameter_count(GatherExcite(channels, extent=8, learned=True), (1, 8, 8, channels)) == mlp + 11 * channels * 3
    )
    assert (
        parameter_count(GatherExcite(channels, learned=True), (1, 8, 8, channels)) == mlp + 64 * channels + 2 * channels
    )


@pytest.mark.parametrize("extent", [1, 3, 6, -2])
def test_refuses_extents_that_are_no_power_of_two(extent):
    with pytest.raises(ValueError, match=f"extent={extent}"):
        applied(GatherExcite(8, extent=extent), np.zeros((1, 4, 4, 8)))
