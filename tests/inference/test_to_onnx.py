from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hga_flax.errors import UserError
from hga_flax.inference.fold import fold
from hga_flax.inference.to_stablehlo import load, to_stablehlo
from hga_flax.models import create_model
from tests.reference import perturbed

onnxruntime = pytest.importorskip("onnxruntime", reason="the ONNX packages are not installed")
pytest.importorskip("onnx", reason="the ONNX packages are not installed")

from hga_flax.inference.to_onnx import to_onnx  # noqa: E402

(BATCH,) = jax.export.symbolic_shape("batch")
RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.normal(size=(3, 3, 2, 4)).astype(np.float32)
MATRIX = RANDOM.normal(size=(2, 5)).astype(np.float32)
CELLS = RANDOM.normal(size=(3, 6, 4)).astype(np.float32)
ROWS = np.array([0, 0, 2, 5])


def convolution(x, weights, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, weights, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def pooled(x, start, operation):
    return lax.reduce_window(x, start, operation, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 0), (0, 0)))


def converted(function):
    images = jax.ShapeDtypeStruct((BATCH, 6, 6, 4), jnp.float32)
    return to_onnx(fold(lambda x: {"result": function(x)}, images), images, {"key": "value"})


def served(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["result"], {"images": x})[0]


FUNCTIONS = {
    "a strided grouped convolution": lambda x: convolution(x, WEIGHTS, (2, 1), ((1, 2), (0, 1)), feature_group_count=2),
    "a dilated convolution": lambda x: convolution(x[..., :2], WEIGHTS, rhs_dilation=(2, 1)),
    "a convolution and its bias": lambda x: convolution(x[..., :2], WEIGHTS) * 2 + np.arange(4, dtype=np.float32),
    "weights that are computed": lambda x: convolution(x[:, :, :, :2], WEIGHTS * x.max()),
    "a matrix product": lambda x: x[..., 1:3] @ MATRIX,
    "products with batch axes": lambda x: jnp.einsum("bhwc,ahc->bwac", x, CELLS),
    "products of two maps": lambda x: jnp.einsum("bhwc,bhvc->bwv", x, x + 1),
    "pooling": lambda x: pooled(x, -jnp.inf, lax.max) + pooled(x, 0.0, lax.add),
    "reductions": lambda x: x.sum(axis=(1, 2)) + x.max(axis=1).min(axis=1),
    "a softmax": lambda x: jax.nn.softmax(x, axis=(1, 2)),
    "unary functions": lambda x: (
        jnp.tanh(x) + jnp.exp(-jnp.abs(x)) * jax.nn.sigmoid(x) + lax.rsqrt(x**2 + 1) + lax.erf(x)
    ),
    "gelu and silu": lambda x: jax.nn.gelu(x) + jax.nn.silu(x) + jax.nn.relu(x) ** 3 + jnp.sqrt(jnp.square(x)),
    "choices": lambda x: jnp.where(x > 0.5, x, jnp.minimum(2 * x, -1)) + jnp.maximum(x, 0.1) + jnp.sign(x),
    "strided slices": lambda x: x[:, ::2, 1::2] + x[:, 1:4, 2:5],
    "one row, rows, places": lambda x: (
        x[:, 3, None] + x[:, ROWS][:, :, :, None].sum(3)[:, :, ROWS].sum(1, keepdims=True)[:, :, :1]
    ),
    "padding": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1)), constant_values=3),
    "joining": lambda x: jnp.concatenate([x, x[:, :2]], axis=1).swapaxes(1, 2) + jnp.stack([x[:, 0]] * 8, axis=2),
    "splitting": lambda x: [y := jnp.split(x, (1, 3), axis=3), y[1] * y[0] + y[2]][1],
    "shapes": lambda x: x.reshape(-1, 36, 4).transpose(2, 0, 1).reshape(4, -1, 6, 6)[1:].sum(0)[..., None],
    "what is spread over the batch": lambda x: jnp.concatenate(
        [x, jnp.broadcast_to(CELLS[0][None, None], x.shape)], axis=-1
    ),
    "a result that is constant": lambda x: jnp.broadcast_to(jnp.arange(3.0), (x.shape[0], 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_gives_what_jax_gives(name):
    model = converted(FUNCTIONS[name])
    for count in (1, 3):
        x = np.random.default_rng(count).normal(size=(count, 6, 6, 4)).astype(np.float32)
        expected = FUNCTIONS[name](jnp.asarray(x))
        found = served(model, x)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


# One of each kind of block, small, on a map whose sides every pooling has to cut.
NETWORKS = {
    "resnet18": {"stage_sizes": (1, 1), "features": 8},
    "vgg11_bn": {"stage_sizes": (1, 1), "features": 8, "hidden": 6},
    "res2net50d": {"stage_sizes": (2, 1), "features": 32},
    "resnest50d": {"stage_sizes": (1, 1), "features": 16, "stem_width": 8},
    "resnest50d_4s2x40d": {"stage_sizes": (1, 1), "features": 32, "stem_width": 8},
}


@pytest.mark.medium
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_what_jax_gives_in_both_formats(name):
    model = create_model(name, attention="hga", num_classes=5, **NETWORKS[name])
    x = RANDOM.normal(size=(3, 36, 26, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    images = jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), jnp.float32)
    folded = fold(lambda x: {"result": model.apply(variables, x)}, images)
    graph = to_onnx(folded, images, {})
    expected = np.asarray(jax.jit(model.apply)(variables, x))
    for found in (served(graph, x), load(to_stablehlo(folded, images))(x)["result"]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert convolutions and all(len(node.input) == 3 for node in convolutions)  # every norm is a bias of its own


def test_a_bias_belongs_to_its_convolution_and_nothing_unused_is_kept():
    model = converted(FUNCTIONS["a convolution and its bias"])
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["Conv"] == 1 and not counts["Add"] and not counts["Mul"]
    assert len(next(node for node in model.graph.node if node.op_type == "Conv").input) == 3
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("key", "value")]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x - x.mean(), "'dim_as_value' is not supported"),
        (lambda x: jnp.cumsum(x, axis=1), "'cumsum' is not supported by --format=onnx"),
        (
            lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"),
            "not over height and width",
        ),
        (
            lambda x: convolution(x[..., :2], WEIGHTS, padding=((1, 1), (1, 1)), lhs_dilation=(2, 1)),
            "transposed convolution",
        ),
        (lambda x: jnp.take_along_axis(x, (x > 0).astype(int), axis=1), "a gather that is not a slice"),
    ],
)
def test_what_cannot_be_written_is_said(function, message):
    with pytest.raises(UserError, match=message):
        converted(function)
