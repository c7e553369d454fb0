import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import create_attention
from hga_flax.models import norm
from hga_flax.models.norm import BatchNorm, frozen_statistics

X = np.random.RandomState(0).standard_normal((4, 3, 5, 6)) * 2 + 1


def variables(dtype):
    draw = np.random.RandomState(1).uniform
    return {
        "params": {"scale": draw(0.5, 2, 6).astype(dtype), "bias": draw(-1, 1, 6).astype(dtype)},
        "batch_stats": {"mean": draw(-1, 1, 6).astype(dtype), "var": draw(0.5, 2, 6).astype(dtype)},
    }


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_flaxs_batch_norm(average, dtype):
    ours = BatchNorm(average, dtype=jnp.dtype(dtype))
    flaxs = nn.BatchNorm(average, momentum=0.9, epsilon=1e-5, dtype=jnp.dtype(dtype))
    x = jnp.asarray(X, dtype)
    shapes = lambda module: jax.tree.map(jnp.shape, module.init(jax.random.key(0), x))
    assert shapes(ours) == shapes(flaxs)
    results = []
    for module in (ours, flaxs):
        y, updates = module.apply(variables(np.float32), x, mutable=["batch_stats"])
        assert y.dtype == x.dtype
        results.append((y.astype(jnp.float32), updates["batch_stats"]))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-6)


def test_scale_starts_as_asked_for():
    params = BatchNorm(True, scale_init=nn.initializers.zeros).init(jax.random.key(0), jnp.asarray(X))["params"]
    assert not params["scale"].any() and not params["bias"].any()


@pytest.mark.parametrize("average", [True, False])
def test_the_affine_map_is_the_one_applied_with_its_gradients(average):
    with jax.enable_x64(True):
        module, weight = BatchNorm(average, dtype=jnp.float64), np.sin(np.arange(X.size)).reshape(X.shape)

        def plain(v, x):
            return (module.apply(v, x, mutable=["batch_stats"])[0] ** 2 * weight).sum()

        def by_map(v, x):
            (_, affine), _ = module.apply(v, x, True, mutable=["batch_stats"])
            return (((x - affine.center) * affine.scale + affine.offset) ** 2 * weight).sum()

        arguments = jax.tree.map(jnp.asarray, (variables(np.float64), X))
        results = [jax.tree.leaves(jax.value_and_grad(f, argnums=(0, 1))(*arguments)) for f in (plain, by_map)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


class Foreign(nn.Module):
    """Norms as they are written elsewhere: told at construction and at the call."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = BatchNorm(not train)(nn.relu(x))
        x = nn.BatchNorm()(nn.relu(x), not train)
        return nn.BatchNorm()(nn.relu(x), use_running_average=not train)


@pytest.mark.parametrize("mean", [1, 30])
def test_its_rounding_is_that_of_flaxs_batch_norm(mean):
    """On CPUs the map is not centred; for a mean of many deviations the variance loses more digits."""
    x, weight = X + mean, np.sin(np.arange(X.size)).reshape(X.shape)

    def results(module, dtype):
        def loss(params, x):
            given = variables(dtype) | {"params": params}
            return (module.apply(given, x, mutable=["batch_stats"])[0] ** 2 * weight.astype(dtype)).sum()

        given = variables(dtype)["params"], x.astype(np.float32).astype(dtype)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*given))]

    with jax.enable_x64(True):
        exact = results(nn.BatchNorm(False, dtype=jnp.float64), np.float64)
    errors = [
        max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(result, exact, strict=True))
        for result in (results(BatchNorm(False), np.float32), results(nn.BatchNorm(False), np.float32))
    ]
    assert errors[0] < 2 * errors[1] < 1e-3


@pytest.mark.parametrize("center", [jax.lax.stop_gradient, lambda mean: mean, jnp.zeros_like])
def test_the_gradients_of_each_devices_form_are_flaxs(center, monkeypatch):
    monkeypatch.setattr(norm, "_center", center)
    weight = np.sin(np.arange(X.size)).reshape(X.shape)
    with jax.enable_x64(True):
        loss = lambda module: lambda v, x: (module.apply(v, x, mutable=["batch_stats"])[0] ** 2 * weight).sum()
        arguments = jax.tree.map(jnp.asarray, (variables(np.float64), X))
        results = [
            jax.tree.leaves(jax.value_and_grad(loss(kind(False, dtype=jnp.float64)), argnums=(0, 1))(*arguments))
            for kind in (BatchNorm, nn.BatchNorm)
        ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_on_cpus_no_centred_map_is_kept_for_the_backward_pass():
    def subtractions(module):
        loss = lambda v, x: jnp.sin(module.apply(v, x, mutable=["batch_stats"])[0]).sum()
        program = jax.jit(jax.grad(loss)).lower(variables(np.float32), jnp.asarray(X, jnp.float32)).compile()
        return re.findall(r"f32\[4,3,5,6\]\S* subtract\(", program.as_text())

    assert not subtractions(BatchNorm(False)) and subtractions(nn.BatchNorm(False))


def test_inference_has_no_operation_more_than_flaxs():
    def operations(module):
        apply = jax.jit(lambda v, x: module.apply(v, x))
        text = apply.lower(variables(np.float32), jnp.asarray(X, jnp.float32)).as_text()
        return sum(text.count(f"stablehlo.{name} ") for name in ("add", "subtract", "multiply", "case"))

    assert operations(BatchNorm(True)) <= operations(nn.BatchNorm(True)) > 0


@pytest.mark.parametrize("name", ["foreign", "sk", "nl"])
def test_frozen_statistics_are_those_of_inference_and_stay(name):
    x = jnp.asarray(X, jnp.float32)
    module = Foreign() if name == "foreign" else create_attention(name, 6)
    first = jax.jit(module.init)(jax.random.key(0), x)
    draw = np.random.RandomState(1).uniform
    stats = jax.tree.map(lambda s: jnp.asarray(draw(0.5, 2, s.shape), jnp.float32), first["batch_stats"])
    given = {"params": first["params"], "batch_stats": stats}
    apply = lambda: jax.jit(lambda v: module.apply(v, x, True, mutable=["batch_stats"]))(given)
    with frozen_statistics():
        y, after = apply()
    np.testing.assert_allclose(y, jax.jit(lambda v: module.apply(v, x, False))(given), rtol=1e-5, atol=1e-6)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after["batch_stats"], stats)
    assert all(jax.tree.leaves(same))
    with frozen_statistics(False):
        moved = apply()[1]["batch_stats"]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(stats), strict=True))
