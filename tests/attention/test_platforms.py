import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from hga_flax.attention.platforms import by_platform, on_gpus
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


def test_over_devices_the_gradient_of_what_they_share_is_summed_once():
    random = np.random.RandomState(0)
    x, weight = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((8, 3), (3, 2)))

    def gradient(x, weight):
        return jax.grad(lambda weight: lax.psum(jnp.sin(product(x, weight)).sum(), "data"))(weight)

    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(gradient, mesh=tiny.mesh(4), in_specs=(split, whole), out_specs=whole)
    expected = jax.grad(lambda weight: jnp.sin(x @ weight).sum())(weight)
    np.testing.assert_allclose(jax.jit(sharded)(x, weight), expected, rtol=1e-5)
