import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from hga_flax.platforms import by_platform, on_gpus, platform_dependent, programs_for, varying_alike
from tests.training import tiny


def product(x, weight):
    return by_platform(jnp.matmul, x, weight, **on_gpus(lambda x, weight: jnp.einsum("bi,io->bo", x, weight)))


@pytest.mark.parametrize(("platform", "own"), [("cpu", 0), ("tpu", 0), ("cuda", 1), ("rocm", 1)])
def test_a_platform_compiles_its_own_form_and_no_other(platform, own):
    form = lambda x: jnp.cos(x)
    function = lambda x: by_platform(jnp.sin, x, **on_gpus(form)).sum()
    text = jax.jit(function).trace(jnp.zeros(3)).lower(lowering_platforms=(platform,)).as_text()
    assert (text.count("stablehlo.cosine"), text.count("stablehlo.sine")) == (own, 1 - own)
    # The gradient is the form's own.
    text = jax.jit(jax.grad(function)).trace(jnp.zeros(3)).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.negate" in text) == bool(own)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("cpu", {"cpu"}), ("tpu", {"default"}), ("gpu", set())],  # for CUDA or ROCm: the program above
)
def test_programs_for_a_device_trace_its_form_alone(platform, expected):
    def form(name):
        return lambda x: traced.append(name) or x * x

    def of_all(x):
        x = by_platform(form("default"), x, cpu=form("cpu"), cuda=form("cuda"))
        return platform_dependent(x, default=form("default"), cpu=form("cpu"), cuda=form("cuda"))

    function, traced = jax.jit(jax.value_and_grad(of_all)), []
    assert function(2.0) == (16, 32)  # is not taken from JAX's cache below
    assert set(traced) == {"default", "cpu", "cuda"}
    traced.clear()
    with programs_for(types.SimpleNamespace(platform=platform)):
        assert function(2.0) == (16, 32)
        assert set(traced) == expected
    traced.clear()
    assert function(2.0) == (16, 32) and not traced


def test_a_gradient_that_gpus_share_is_traced_once():
    traced = []
    form = lambda x: traced.append(x) or x * x
    jax.make_jaxpr(jax.grad(lambda x: by_platform(jnp.square, x, **on_gpus(form))))(2.0)
    assert len(traced) == 2  # forward and backward; "cuda" and "rocm" name one function


def test_over_devices_the_gradient_of_what_they_share_is_summed_once():
    random = np.random.RandomState(0)
    x, weight = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((8, 3), (3, 2)))

    def gradient(x, weight):
        return jax.grad(lambda weight: lax.psum(jnp.sin(product(x, weight)).sum(), "data"))(weight)

    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(gradient, mesh=tiny.mesh(4), in_specs=(split, whole), out_specs=whole)
    expected = jax.grad(lambda weight: jnp.sin(x @ weight).sum())(weight)
    np.testing.assert_allclose(jax.jit(sharded)(x, weight), expected, rtol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["replicated", "varying"])
def test_inside_shard_map_arrays_vary_as_any_of_them_does(own):
    seen = []

    def look(x, kernel):
        seen.extend(jax.typeof(array).manual_axis_type.varying for array in varying_alike((kernel, x)))
        return x

    x, kernel = jnp.zeros((8, 3)), jnp.zeros((3, 2))
    of_map = PartitionSpec("data") if own else PartitionSpec()
    sharded = jax.shard_map(look, mesh=tiny.mesh(4), in_specs=(of_map, PartitionSpec()), out_specs=of_map)
    jax.eval_shape(sharded, x, kernel)
    assert seen == 2 * [{"data"} if own else frozenset()]
    assert varying_alike((kernel, x))[0] is kernel  # outside there is nothing to mark
