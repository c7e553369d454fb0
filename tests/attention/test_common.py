import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import common
from hga_flax.attention.common import Source, at_least_float32, check_map, gated, global_mean, hidden_channels
from tests.reference import sample, sigmoid


@pytest.mark.parametrize(
    ("channels", "ratio", "hidden"),
    [(256, 16, 16), (2048, 16, 128), (480, 16, 30), (528, 16, 33), (16, 16, 1), (8, 16, 1)],
)
def test_hidden_channels_are_a_fraction_and_never_none(channels, ratio, hidden):
    assert hidden_channels(channels, ratio) == hidden


def test_hidden_channels_refuses_a_ratio_of_zero():
    with pytest.raises(ValueError, match="ratio=0"):
        hidden_channels(64, 0)


def test_check_map_names_the_module_and_the_shape():
    with pytest.raises(ValueError, match=r"SE\(8\) needs a map \[B, H, W, 8\], not \[2, 3, 3, 4\]"):
        check_map("SE", jnp.zeros((2, 3, 3, 4)), 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "channels", "message"),
    [
        ((2, 3, 3, 8), jnp.uint8, 8, r"SE\(8\) needs a floating-point map, not uint8"),
        ((2, 3, 0, 8), jnp.float32, 8, r"SE\(8\) needs a map \[B, H, W, 8\], not \[2, 3, 0, 8\]"),
        ((2, 3, 3, 8), jnp.float32, "8", r"SE\('8'\): the number of channels must be a positive integer"),
        ((2, 3, 3, 8), jnp.float32, 8.0, r"SE\(8.0\): the number of channels must be a positive integer"),
        ((2, 3, 3, 0), jnp.float32, 0, r"SE\(0\): the number of channels must be a positive integer"),
    ],
)
def test_check_map_refuses_what_would_be_gated_wrongly(shape, dtype, channels, message):
    with pytest.raises(ValueError, match=message):
        check_map("SE", jnp.zeros(shape, dtype), channels)


def test_gate_and_mean_are_float32_for_bfloat16_maps():
    x = jnp.ones((1, 64, 64, 2), jnp.bfloat16)
    assert global_mean(x).dtype == jnp.float32
    assert float(global_mean(x)[0, 0]) == 1.0  # a bfloat16 sum stops growing at 256
    assert gated(x, jnp.zeros((1, 1, 1, 2), jnp.bfloat16)).dtype == jnp.bfloat16
    assert at_least_float32(x).dtype == jnp.float32


def test_gated_multiplies_by_the_sigmoid():
    x, e = sample((2, 3, 3, 4)), sample((2, 1, 1, 4), seed=1)
    np.testing.assert_allclose(
        gated(jnp.asarray(x, jnp.float32), jnp.asarray(e, jnp.float32)), x * sigmoid(e), rtol=1e-5
    )


def test_a_source_projects_and_gates_as_its_map_does_with_the_same_gradients():
    with jax.enable_x64(True):
        names = {"inner": (2, 3, 3, 4), "kernel": (4, 6), "scale": (6,), "offset": (6,), "center": (6,)}
        parts = {name: jnp.asarray(sample(shape, seed)) for seed, (name, shape) in enumerate(names.items())}
        weight, gate = jnp.asarray(sample((6, 2), 8)), jnp.asarray(sample((2, 6), 9))

        def by_map(parts, weight, gate):
            y = (parts["inner"] @ parts["kernel"] - parts["center"]) * parts["scale"] + parts["offset"]
            return y @ weight, y * gate[:, None, None]

        def by_source(parts, weight, gate):
            source = Source(raw=parts["inner"] @ parts["kernel"], **parts)
            folded, offset = source.project(weight)
            return source.inner @ folded + offset, source.gated(gate)

        def result(function):
            loss = lambda *arguments: sum(jnp.sin(y).sum() for y in function(*arguments))
            return function(parts, weight, gate), jax.grad(loss, argnums=(0, 1, 2))(parts, weight, gate)

        results = [result(function) for function in (by_map, by_source)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_source_folds_weights_in_their_dtype_and_gates_in_that_of_the_map():
    c = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    source = Source(c(1, 2, 2, 3), jnp.ones((3, 4)), c(1, 2, 2, 4), jnp.ones(4), jnp.ones(4), jnp.zeros(4))
    assert [part.dtype for part in source.project(jnp.ones((4, 2)))] == [jnp.float32, jnp.float32]
    assert source.gated(jnp.ones((1, 4))).dtype == jnp.bfloat16


def test_the_gradient_of_the_largest_goes_to_its_first_place():
    x = jnp.array([[1.0, 3.0, 2.0, 3.0], [-1.0, -2.0, -1.0, -5.0]])
    for axis, places in ((-1, [[0, 1, 0, 0], [1, 0, 0, 0]]), (0, [[1, 1, 1, 1], [0, 0, 0, 0]])):
        weights = jnp.array([2.0, -3.0]) if axis else jnp.array([2.0, -3.0, 4.0, 0.5])
        value = lambda x, axis=axis, weights=weights: (common.largest(x, axis).squeeze(axis) * weights).sum()
        assert (common.largest(x, axis) == x.max(axis, keepdims=True)).all()
        expected = np.array(places) * np.expand_dims(weights, axis)
        np.testing.assert_array_equal(jax.grad(value)(x), expected)
        np.testing.assert_array_equal(jax.jacfwd(value)(x), expected)


def test_the_gradient_of_the_largest_divides_by_no_number_of_equals():
    """JAX's does; the number is 0 where XLA computes the map again, rounded otherwise (seen in CBAM)."""
    text = lambda largest: str(jax.make_jaxpr(jax.grad(lambda x: largest(x).sum()))(jnp.arange(8.0)[None]))
    assert " div " in text(lambda x: x.max(-1, keepdims=True))
    assert " div " not in text(lambda x: common.largest(x, -1))
