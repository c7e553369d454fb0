from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hga_flax.inference.fold import fold
from hga_flax.models import create_model


def operations(function, *arguments):
    program = jax.make_jaxpr(function)(*arguments)
    return Counter(eqn.primitive.name for eqn in program.eqns)


def network(name, attention, dtype=jnp.float32, **options):
    """Returns a function of `[B, 8, 8, 3]` with random weights and statistics."""
    model = create_model(name, attention=attention, num_classes=5, dtype=dtype, features=4, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    random = np.random.default_rng(0)
    positive = lambda path: path[-1].key in ("var", "scale")
    draw = lambda path, x: random.uniform(0.5, 1.5, x.shape) if positive(path) else random.normal(0, 0.3, x.shape)
    variables = jax.tree.map_with_path(lambda path, x: draw(path, x).astype(dtype), shapes)
    return lambda x: model.apply(variables, x)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "attention"),
    [("cifar_resnet8", "hga"), ("cifar_preact_resnet11_bottleneck", "cbam")],
)
def test_the_logits_are_the_same_in_float64(name, attention):
    with jax.enable_x64(True):
        x = np.random.default_rng(1).normal(size=(3, 8, 8, 3))
        plain = network(name, attention, jnp.float64)
        expected = jax.jit(plain)(x)
        found = jax.jit(fold(plain, x))(x)
        assert expected.dtype == found.dtype == jnp.float64
        # HGA and BatchNorm hold some constants in float32.
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11 * abs(expected).max())


def test_norms_vanish_in_the_convolutions_before_them():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    plain = network("cifar_resnet8", "none")
    assert operations(fold(plain, x), x) == {
        "conv_general_dilated": 9,  # the stem, three blocks of two, two shortcuts
        "add": 9 + 3 + 1,  # a bias for each of them, a sum for each block, the classifier's bias
        "max": 7,
        "reduce_sum": 1,
        "mul": 1,  # the mean over positions
        "dot_general": 1,
    }


def test_norms_that_come_first_are_one_multiplication_and_one_addition():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    counts = operations(fold(network("cifar_preact_resnet8", "none"), x), x)
    assert counts["conv_general_dilated"] == 9
    # Of seven norms three follow a convolution. Four do not: each block's first and the last.
    assert counts["mul"] == 4 + 1 and counts["add"] == 3 + 4 + 3 + 1
    assert not counts.keys() & {"sub", "div", "rsqrt"}


KERNEL = np.random.default_rng(2).normal(size=(3, 3, 2, 4)).astype(np.float32)
CHANNELS = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
ROWS = np.arange(1.0, 6.0, dtype=np.float32)[:, None, None]


def conv(x):
    return lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("function", "counts"),
    [
        (lambda x: (conv(x) - 0.3) / CHANNELS * 2 + 1, {"mul": 0, "add": 1}),
        (lambda x: CHANNELS - conv(x), {"mul": 0, "add": 1, "sub": 0}),
        (lambda x: -(conv(x) * CHANNELS), {"mul": 0, "add": 0, "neg": 0}),
        (lambda x: conv(x) * CHANNELS * ROWS + ROWS, {"mul": 1, "add": 1}),  # not one number a channel
        (lambda x: jax.nn.relu(y := conv(x)) + y * CHANNELS, {"mul": 1, "add": 1}),  # two uses, one convolution
        (lambda x: 1 / (conv(x) ** 2 + CHANNELS), {"div": 1, "add": 1}),
        (lambda x: conv((x - 0.5) / 0.25), {"mul": 1, "add": 1, "sub": 0, "div": 0}),  # not into it: zeros are padded
        (lambda x: conv(jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))) * jnp.sin(ROWS[:1])), {"sin": 0, "mul": 1}),
    ],
)
def test_affine_maps_of_a_convolution(function, counts):
    x = np.random.default_rng(3).normal(size=(2, 5, 5, 2)).astype(np.float32)
    folded = fold(function, x)
    np.testing.assert_allclose(folded(x), function(x), rtol=2e-5, atol=2e-5)
    found = operations(folded, x)
    assert found["conv_general_dilated"] == 1 and {name: found[name] for name in counts} == counts


def test_products_of_matrices_and_results_of_all_kinds():
    weights = np.random.default_rng(4).normal(size=(2, 4)).astype(np.float32)
    function = lambda x: {"product": (x @ weights) * CHANNELS + 1, "known": CHANNELS * 2, "same": x}
    x = np.ones((3, 2), np.float32)
    folded = fold(function, x)
    found, expected = folded(x), function(x)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    assert operations(folded, x) == {"dot_general": 1, "add": 1}


def test_a_batch_of_unknown_size_stays_unknown():
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
    program = jax.make_jaxpr(fold(network("cifar_resnet8", "hga"), x))(x)
    assert program.out_avals[0].shape == (batch, 5)
