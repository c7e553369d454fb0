import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from hga_flax.analysis.compiled import collectives
from hga_flax.models import grouped_conv
from hga_flax.models.grouped_conv import block_diagonal, grouped_convolution
from tests.training import tiny

NUMBERS = ("NHWC", "HWIO", "NHWC")
X = np.random.RandomState(0).standard_normal((4, 6, 5, 8))
KERNEL = np.random.RandomState(1).standard_normal((3, 3, 2, 12))


def plain(x, kernel, groups=4):
    return lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=NUMBERS, feature_group_count=groups
    )


def ours(x, kernel):
    return grouped_convolution(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=NUMBERS, feature_group_count=4)


def results(function):
    loss = lambda x, kernel: (y := function(x, kernel), jnp.sin(y).sum())[::-1]
    return jax.jit(jax.value_and_grad(lambda *a: loss(*a)[0], argnums=(0, 1)))(jnp.asarray(X), jnp.asarray(KERNEL))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_either_form_has_the_values_and_gradients_of_a_grouped_convolution(platform, monkeypatch):
    if platform == "tpu":  # the form that a TPU would compile, computed here
        monkeypatch.setattr(grouped_conv.lax, "platform_dependent", lambda *a, tpu, default: tpu(*a))
    with jax.enable_x64(True):
        for a, b in zip(*map(jax.tree.leaves, (results(ours), results(plain))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("platform", "grouped"), [("cpu", True), ("cuda", True), ("tpu", False)])
def test_which_form_a_platform_compiles(platform, grouped):
    arguments = jnp.asarray(X, jnp.float32), jnp.asarray(KERNEL, jnp.float32)
    text = jax.jit(ours).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == 1
    assert ("feature_group_count = 4" in text) == grouped


def test_the_block_diagonal_kernel_is_zero_between_groups():
    dense = np.asarray(block_diagonal(jnp.asarray(KERNEL), 4))
    assert dense.shape == (3, 3, 8, 12)
    np.testing.assert_array_equal(dense[:, :, 2:4, 3:6], np.float32(KERNEL[:, :, :, 3:6]))
    assert (dense != 0).sum() == KERNEL.size


def test_over_devices_the_gradient_is_summed_grouped(monkeypatch):
    monkeypatch.setattr(grouped_conv.lax, "platform_dependent", lambda *a, tpu, default: tpu(*a))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def gradient(x, kernel):
        return jax.grad(lambda kernel: lax.psum(jnp.sin(ours(x, kernel)).sum(), "data"))(kernel)

    sharded = jax.shard_map(gradient, mesh=tiny.mesh(4), in_specs=(split, whole), out_specs=whole)
    arguments = jnp.asarray(X, jnp.float32), jnp.asarray(KERNEL, jnp.float32)
    compiled = jax.jit(sharded).lower(*arguments).compile()
    expected = jax.grad(lambda kernel: jnp.sin(plain(arguments[0], kernel)).sum())(arguments[1])
    np.testing.assert_allclose(compiled(*arguments), expected, rtol=1e-4, atol=1e-4)
    # Without the zeros that the dense form adds.
    assert collectives(compiled.as_text()) == {"all-reduce": {"count": 1, "bytes": 4 * KERNEL.size}}
