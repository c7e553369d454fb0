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


ONE = {"feature_group_count": 1}
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


# Blocks of several images, of one, of bands of rows; strides, margins and sizes that leave something over.
DENSE = {
    "several images": ((6, 7, 5, 4), (3, 3, 4, 5), 1, "SAME"),
    "one image": ((3, 20, 20, 3), (3, 3, 3, 4), 1, ((1, 1), (1, 1))),
    "bands": ((2, 30, 28, 64), (3, 3, 64, 2), 1, "SAME"),
    "bands, strided": ((2, 61, 56, 64), (3, 3, 64, 2), 2, ((1, 0), (0, 2))),
    "the stem": ((2, 64, 64, 3), (7, 7, 3, 4), 2, ((3, 3), (3, 3))),
    "strided past the end": ((2, 8, 9, 3), (3, 2, 3, 4), 3, "VALID"),
    "a 1x1 with margins": ((2, 8, 9, 3), (1, 1, 3, 4), 2, ((1, 0), (0, 1))),
    "bands of a 1x1": ((1, 60, 60, 8), (1, 1, 8, 4), 1, "SAME"),
}


@pytest.mark.parametrize("rows", [20, module.FEWEST_ROWS])
@pytest.mark.parametrize("case", DENSE)
def test_on_cpus_a_dense_convolution_has_the_values_and_gradients_of_lax_in_float64(case, rows, monkeypatch):
    monkeypatch.setattr(module, "FEWEST_ROWS", rows)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", rows * 32)
    shape, kernel, stride, padding = DENSE[case]
    draw = np.random.RandomState(0).standard_normal
    options = {"dimension_numbers": NUMBERS, "feature_group_count": 1}
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(draw(shape)), jnp.asarray(draw(kernel))
        loss = lambda f: lambda *a: jnp.sin(f(*a, (stride, stride), padding, **options)).sum()
        both = [jax.jit(jax.value_and_grad(loss(f), argnums=(0, 1)))(x, kernel) for f in (convolution, LAX)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * np.abs(b).max())


@pytest.mark.parametrize(
    ("shape", "columns", "expected"),
    [
        ((16, 56, 56), 576, (1, 7)),  # 392 rows at most: 7 of 56
        ((16, 14, 14), 2304, (2, 14)),
        ((16, 7, 7), 4608, (8, 7)),
        ((16, 112, 112), 147, (1, 7)),
        ((128, 24, 24), 144, (1, 24)),
        ((128, 12, 12), 288, (2, 12)),
        ((7, 5, 5), 9, (7, 5)),
        ((3, 13, 500), 18, (1, 13)),
        ((3, 13, 5000), 900, (1, 1)),
        ((1, 1, 1), 4608, (1, 1)),
    ],
)
def test_a_block_divides_the_map_and_fits_the_cache(shape, columns, expected):
    images, rows = module.block_shape(*shape, columns)
    assert (images, rows) == expected and shape[0] % images == 0 and shape[1] % rows == 0


def test_on_cpus_the_gradient_of_a_kernel_is_no_convolution():
    loss = lambda x, k: jnp.sin(convolution(x, k, (1, 1), "SAME", **{"dimension_numbers": NUMBERS}, **ONE)).sum()
    arguments = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arguments)
    count = {p: traced.lower(lowering_platforms=(p,)).as_text().count("stablehlo.convolution") for p in ("cpu", "tpu")}
    assert count == {"cpu": 2, "tpu": 3}


def test_what_is_dilated_stays_laxs():
    options = {"dimension_numbers": NUMBERS, "feature_group_count": 4, "rhs_dilation": (2, 2)}
    both = [f(jnp.asarray(X), jnp.asarray(KERNEL), (1, 1), "SAME", **options) for f in (convolution, LAX)]
    np.testing.assert_array_equal(*both)


def test_the_block_diagonal_kernel_is_zero_between_groups():
    dense = np.asarray(block_diagonal(jnp.asarray(KERNEL), 4))
    assert dense.shape == (3, 3, 8, 12)
    np.testing.assert_array_equal(dense[:, :, 2:4, 3:6], np.float32(KERNEL[:, :, :, 3:6]))
    assert (dense != 0).sum() == KERNEL.size


@pytest.mark.skipif(jax.device_count() < 4, reason="four devices are needed; CPUs simulate eight")
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_over_devices_the_gradient_is_summed_grouped(platform, monkeypatch):
    monkeypatch.setattr(module.lax, "platform_dependent", lambda *a, **forms: forms[platform](*a))
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
