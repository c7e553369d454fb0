import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from hga_flax.counting.compiled import collectives
from hga_flax.models import convolution as module
from hga_flax.models.convolution import block_diagonal, convolution
from tests.training import tiny

NUMBERS = ("NHWC", "HWIO", "NHWC")
X = np.random.RandomState(0).standard_normal((4, 6, 5, 8))
LAX = lax.conv_general_dilated
KERNEL = np.random.RandomState(1).standard_normal((3, 3, 2, 12))


def plain(x, kernel, groups=4):
    return lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=NUMBERS, feature_group_count=groups
    )


def ours(x, kernel):
    return convolution(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=NUMBERS, feature_group_count=4)


def results(function, kernel=KERNEL):
    loss = lambda x, kernel: (y := function(x, kernel), jnp.sin(y).sum())[::-1]
    return jax.jit(jax.value_and_grad(lambda *a: loss(*a)[0], argnums=(0, 1)))(jnp.asarray(X), jnp.asarray(kernel))


POINT = np.random.RandomState(2).standard_normal((1, 1, 8, 5))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0), (0, 0)), ((1, 0), (0, 2))], ids=str)
def test_a_1x1_convolution_has_the_values_and_gradients_of_lax(stride, padding):
    options = {"dimension_numbers": NUMBERS, "feature_group_count": 1}
    both = [lambda x, kernel, f=f: f(x, kernel, (stride, stride), padding, **options) for f in (convolution, LAX)]
    with jax.enable_x64(True):
        for a, b in zip(*(jax.tree.leaves(results(function, POINT)) for function in both), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("platform", "count"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_on_cpus_a_1x1_convolution_and_its_gradients_are_products_of_matrices(platform, count):
    def loss(x, kernel):
        y = convolution(x, kernel, (1, 1), ((0, 0), (0, 0)), dimension_numbers=NUMBERS, feature_group_count=1)
        return jnp.sin(y).sum()

    arguments = jnp.asarray(X, jnp.float32), jnp.asarray(POINT, jnp.float32)
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == count and text.count("stablehlo.dot_general") == 3 - count


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", ((1, 1), (1, 1)), ((2, 0), (0, 1))], ids=str)
@pytest.mark.parametrize("platform", ["cpu", "cpu, wide", "tpu", "default"])
def test_every_form_has_the_values_and_gradients_of_a_grouped_convolution(platform, padding, stride, monkeypatch):
    asked = []

    def choose(*arguments, **forms):  # the form that another platform would compile, computed here
        asked.append(form := forms[platform.partition(",")[0]])
        return form(*arguments)

    monkeypatch.setattr(module.lax, "platform_dependent", choose)
    if "wide" in platform:
        monkeypatch.setattr(module, "CPU_DENSE_WIDTH", 4)
    options = {"dimension_numbers": NUMBERS, "feature_group_count": 4}
    both = [lambda x, kernel, f=f: f(x, kernel, (stride, stride), padding, **options) for f in (convolution, LAX)]
    with jax.enable_x64(True):
        for a, b in zip(*(jax.tree.leaves(results(function)) for function in both), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("platform", "channels", "convolutions", "grouped"),
    [("cpu", 8, 1, 0), ("cpu", 512, 0, 0), ("cuda", 8, 1, 1), ("tpu", 8, 1, 0), ("tpu", 2048, 1, 1)],
)
def test_which_form_a_platform_compiles(platform, channels, convolutions, grouped):
    arguments = jnp.zeros((1, 4, 4, channels)), jnp.zeros((3, 3, channels // 4, 8))
    text = jax.jit(ours).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("feature_group_count = 4") == grouped


def test_what_is_dilated_stays_laxs():
    options = {"dimension_numbers": NUMBERS, "feature_group_count": 4, "rhs_dilation": (2, 2)}
    both = [f(jnp.asarray(X), jnp.asarray(KERNEL), (1, 1), "SAME", **options) for f in (convolution, LAX)]
    np.testing.assert_array_equal(*both)


def test_the_block_diagonal_kernel_is_zero_between_groups():
    dense = np.asarray(block_diagonal(jnp.asarray(KERNEL), 4))
    assert dense.shape == (3, 3, 8, 12)
    np.testing.assert_array_equal(dense[:, :, 2:4, 3:6], np.float32(KERNEL[:, :, :, 3:6]))
    assert (dense != 0).sum() == KERNEL.size


def test_over_devices_the_gradient_is_summed_grouped(monkeypatch):
    monkeypatch.setattr(module.lax, "platform_dependent", lambda *a, tpu, **others: tpu(*a))
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
