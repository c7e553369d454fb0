from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from hga_flax import platforms
from hga_flax.attention import HGA
from hga_flax.attention.common import Source
from hga_flax.attention.operator import apply_operator, excitation_operator, with_gradient_apart
from hga_flax.attention.shift_pool import pooled_convolutions, stack_kernels
from tests.attention import naive

CASES = {
    "paper": ((7, 5), (1, 2, 4), (1, 3, 5, 7), 1, 1),
    "groups of two": ((8, 12), (1, 2, 4), (3, 5), 2, 1),
    "every scale with weights of its own": ((9, 4), (2, 1), (1, 5), 1, 2),
    "a map smaller than the kernel": ((2, 1), (3, 6), (9, 1), 4, 2),
}


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Takes the GPUs' form here."""
    monkeypatch.setattr(platforms.lax, "platform_dependent", lambda *arrays, cuda, **others: cuda(*arrays))


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_is_pooling_and_the_first_fc_in_float64_with_the_same_gradients(case, products):
    (height, width), bins, sizes, group_size, scales = CASES[case]
    channels, hidden, batch = 8, 3, 4
    draw = np.random.RandomState(0).standard_normal
    with jax.enable_x64(True):
        kernels = stack_kernels([jnp.asarray(draw((k, k, group_size, channels))) for k in sizes])
        kernels = kernels if scales > 1 else kernels.sum(axis=0, keepdims=True)
        suppress = jnp.asarray(draw((scales, sum(j * j for j in bins), channels, hidden)))
        x, weights = jnp.asarray(draw((batch, height, width, channels))), jnp.asarray(draw((batch, hidden)))

        def by_cells(x, kernels, suppress):
            return jnp.einsum("bsnc,sncr->br", pooled_convolutions(x, kernels, bins), suppress)

        def by_operator(x, kernels, suppress):
            operator = excitation_operator(kernels, suppress, height, width, bins, products=products)
            assert operator.shape == (channels, hidden, height, width)
            return apply_operator(x, operator.transpose(1, 2, 3, 0))

        loss = lambda function: lambda *arguments: (jnp.sin(function(*arguments)) * weights).sum()
        results = [
            jax.jit(jax.value_and_grad(loss(function), argnums=(0, 1, 2)))(x, kernels, suppress)
            for function in (by_cells, by_operator)
        ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * np.abs(a).max())


@pytest.mark.medium
@pytest.mark.parametrize("sourced", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"excitation": "concat"}, {"group_size": 2, "kernels": (3, 7)}, {"hap": False}, {"reduced_channels": None}],
    ids=str,
)
def test_on_gpus_a_whole_hga_has_the_plain_ones_values_and_gradients_in_float64(options, sourced, monkeypatch):
    """Beside the plain form, with the map alone and with what it is made of."""
    channels, inner = 24, 6
    draw = np.random.RandomState(0).standard_normal
    module = HGA(channels, dtype=jnp.float64, **{"reduced_channels": 8, **options})
    with jax.enable_x64(True):
        parts = {"inner": (3, 7, 6, inner), "kernel": (inner, channels), "scale": (channels,), "offset": (channels,)}
        parts = {name: jnp.asarray(draw(shape)) for name, shape in parts.items()} | {"center": jnp.zeros(channels)}
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((3, 7, 6, channels))))
        params = jax.tree.map(lambda s: jnp.asarray(draw(s.shape)) / max(1, s.size // s.shape[-1]) ** 0.5, shapes)

        def loss(params, parts):
            raw = parts["inner"] @ parts["kernel"]
            y = (raw - parts["center"]) * parts["scale"] + parts["offset"]
            source = Source(raw=raw, **parts) if sourced else None
            return jnp.sin(module.apply(params, y, True, source)).sum()

        results = []
        for platform in ("default", "cuda", "cpu"):
            choose = lambda *arrays, platform=platform, **forms: forms.get(platform, forms["default"])(*arrays)
            monkeypatch.setattr(platforms.lax, "platform_dependent", choose)
            results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, parts))
            jax.clear_caches()
    for a, b, c in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1e-3, np.abs(a).max()))
        np.testing.assert_allclose(a, c, rtol=1e-9, atol=1e-9 * max(1e-3, np.abs(a).max()))


def lowered(module, train, platform, shape=(2, 8, 8, 24)):
    x = jnp.zeros(shape)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def function(variables, x):
        return module.apply(variables, x, train, mutable=["batch_stats"] if train else False)

    return jax.jit(function).trace(variables, x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("options", "train", "platform", "folds"),
    [
        ({}, True, "cuda", True),
        ({}, True, "cpu", True),
        ({}, True, "tpu", False),
        ({}, False, "cuda", False),
        ({"form": "shift"}, True, "cuda", True),
        ({"form": "conv"}, True, "cuda", False),
        ({"mfe_act": "relu"}, True, "cuda", False),
        ({"mfe_norm": True}, True, "cuda", False),
        ({"ee": False}, True, "cuda", False),
        ({"mfe": False}, True, "cuda", False),
        ({"reduction": 1, "reduced_channels": None}, True, "cuda", True),
    ],
    ids=str,
)
def test_where_it_is_one_operator(options, train, platform, folds):
    """In training on GPUs and CPUs, where all up to the ReLU is linear: the map meets one barrier and one product."""
    module = HGA(24, **{"reduced_channels": 8, **options})
    assert ("optimization_barrier" in lowered(module, train, platform)) == folds


def test_a_wide_hidden_layer_is_not_folded():
    """The operator would be larger than the map."""
    assert "optimization_barrier" not in lowered(HGA(136, reduced_channels=None), True, "cuda", (2, 4, 4, 136))
    assert "optimization_barrier" in lowered(HGA(128, reduced_channels=None), True, "cuda", (2, 4, 4, 128))


def test_what_is_sown_in_training_is_the_same(as_on_gpus):
    module = HGA(24, reduced_channels=8)
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 6, 6, 24)), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    sown = lambda train: jax.jit(lambda x: module.apply(variables, x, train, mutable=["intermediates"])[1])(x)
    plain, ours = (sown(train)["intermediates"] for train in (False, True))
    for name in ("cells", "excitation", "gate"):
        np.testing.assert_allclose(ours[name][0], plain[name][0], rtol=1e-4, atol=1e-6)


def test_a_gradient_apart_is_the_gradient():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.grad(lambda x: (with_gradient_apart(x) ** 2).sum())(x), 2 * x)
    lower = partial(jax.jit(jax.grad(lambda x: (with_gradient_apart(x) ** 2).sum())).trace(x).lower)
    assert "optimization_barrier" in lower(lowering_platforms=("cuda",)).as_text()
    assert "optimization_barrier" not in lower(lowering_platforms=("tpu",)).as_text()


@pytest.fixture(scope="module")
def trained():
    """A small HGA's weights after some steps on the digits, and what its attention then sees."""
    digits = load_digits()
    x = jnp.asarray(digits.images[:256, :, :, None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target[:256])

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = nn.relu(nn.Conv(32, (3, 3), name="conv")(x))
            return nn.Dense(10)(HGA(32, name="attention")(y, train).mean(axis=(1, 2)))

    model, optimizer = Small(), optax.adam(1e-2)
    params = jax.jit(lambda: model.init(jax.random.key(5), x, True))()  # of six keys the one that learns fastest
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, x, True), labels).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4
    y = nn.relu(nn.Conv(32, (3, 3)).apply({"params": params["params"]["conv"]}, x))
    return params["params"]["attention"], np.asarray(y, np.float64)


@pytest.mark.medium
def test_bfloat16_is_as_near_float64_on_trained_weights_as_the_pooling_of_cells_is(trained, monkeypatch):
    weights, y = trained
    y = np.asarray(jnp.asarray(y, jnp.bfloat16), np.float64)  # what a network in bfloat16 hands over
    expected = naive.hga(y, jax.tree.map(lambda a: np.asarray(a, np.float64), weights))
    gate = expected.sum(axis=(1, 2)) / y.sum(axis=(1, 2)).clip(1e-9)
    errors = {}
    for platform in ("default", "cuda"):
        choose = lambda *arrays, platform=platform, **forms: forms.get(platform, forms["default"])(*arrays)
        monkeypatch.setattr(platforms.lax, "platform_dependent", choose)
        module = HGA(32, dtype=jnp.bfloat16)
        apply = jax.jit(lambda y, m=module: m.apply({"params": weights}, y, True, mutable=["intermediates"])[1])
        sown = apply(jnp.asarray(y, jnp.bfloat16))
        ours = np.asarray(sown["intermediates"]["gate"][0], np.float64)
        seen = y.sum(axis=(1, 2)) > 1e-3  # a channel that is zero everywhere shows no gate
        errors[platform] = np.sqrt(np.mean((ours - gate)[seen] ** 2))
    assert 1e-6 < errors["cuda"] < 5e-3
    assert errors["cuda"] < 1.5 * errors["default"]


def test_on_gpus_the_fcs_after_the_relu_are_sums():
    """As products each of them, its gradients and the casts of its weights would be kernels of their own."""
    products = lambda platform: lowered(HGA(24, reduced_channels=8), True, platform).count("dot_general")
    assert products("cuda") == 2 < products("tpu")
