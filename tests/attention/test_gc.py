import numpy as np
import pytest

from hga_flax.attention import GlobalContext
from tests.reference import applied, dense, parameter_count, relative_error, relu, sample, sigmoid, softmax


def layer_norm(x, params):
    normed = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return normed * params["scale"] + params["bias"]


@pytest.mark.parametrize("fusion", ["scale", "add"])
@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_equals_the_equations(fusion, pooling):
    x = sample((2, 5, 3, 16))
    y, params, _ = applied(GlobalContext(16, ratio=4, fusion=fusion, pooling=pooling), x)
    positions = x.reshape(2, 15, 16)
    if pooling == "attention":
        weights = softmax(dense(positions, params["attend"]), axis=1)
        context = (weights * positions).sum(axis=1)
    else:
        context = positions.mean(axis=1)
    e = relu(layer_norm(dense(context, params["squeeze"]), params["norm"]))
    e = dense(e, params["excite"])[:, None, None, :]
    assert relative_error(y, x * sigmoid(e) if fusion == "scale" else x + e) < 1e-5


def test_cost_formula():
    hidden = 256 // 8
    expected = 2 * 256 * hidden + 3 * hidden + 2 * 256 + 1
    assert parameter_count(GlobalContext(256), (1, 2, 2, 256)) == expected


@pytest.mark.parametrize("options", [{"fusion": "concat"}, {"pooling": "max"}])
def test_refuses_unknown_words(options):
    with pytest.raises(ValueError, match="is not"):
        applied(GlobalContext(8, **options), np.zeros((1, 2, 2, 8)))
