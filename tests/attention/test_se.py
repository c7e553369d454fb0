import jax
import numpy as np
import pytest

from hga_flax.attention import SqueezeExcitation
from tests.reference import applied, dense, parameter_count, relative_error, relu, sample, sigmoid


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_equations(bias):
    x = sample((2, 5, 4, 32))
    y, params, _ = applied(SqueezeExcitation(32, ratio=8, bias=bias), x)
    gate = sigmoid(dense(relu(dense(x.mean(axis=(1, 2)), params["squeeze"])), params["excite"]))
    assert relative_error(y, x * gate[:, None, None, :]) < 1e-6


@pytest.mark.parametrize(("channels", "bias"), [(256, True), (256, False), (16, True)])
def test_cost_formula(channels, bias):
    hidden = max(1, channels // 16)
    expected = 2 * channels * hidden + (hidden + channels if bias else 0)
    assert parameter_count(SqueezeExcitation(channels, bias=bias), (1, 2, 2, channels)) == expected


def test_the_hidden_layer_has_a_lower_limit():
    assert parameter_count(SqueezeExcitation(64, min_channels=8), (1, 2, 2, 64)) == 2 * 64 * 8 + 8 + 64


def test_refuses_another_number_of_channels_and_no_hidden_ones():
    with pytest.raises(ValueError, match=r"SqueezeExcitation\(16\)"):
        applied(SqueezeExcitation(16), np.zeros((1, 2, 2, 8)))
    with pytest.raises(ValueError, match="min_channels=0 is not positive"):
        applied(SqueezeExcitation(16, min_channels=0), np.zeros((1, 2, 2, 16)))


def test_sows_its_gate():
    x = sample((2, 5, 4, 16))
    module = SqueezeExcitation(16, ratio=4)
    variables = module.init(jax.random.key(0), x)
    y, state = module.apply(variables, x, mutable=["intermediates"])
    (gate,) = state["intermediates"]["gate"]
    assert set(variables) == {"params"} and relative_error(y, x * np.asarray(gate)[:, None, None, :]) < 1e-6
