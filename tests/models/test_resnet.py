from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hga_flax.attention import HGA, uses_source
from hga_flax.models import create_model
from hga_flax.models.norm import BatchNorm
from hga_flax.models.resnet import Bottleneck, check_rate, depth_rates, survival_drop


def attention_paths(variables: dict) -> set[str]:
    return {block for block, layers in variables["params"].items() if "attention" in layers}


def shapes_of(model) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_every_block_has_its_attention_after_the_last_norm():
    variables = shapes_of(create_model("resnet50", attention="se", stage_sizes=(1, 2), features=16))
    assert attention_paths(variables) == {"stage1_block1", "stage2_block1", "stage2_block2"}
    assert variables["params"]["stage2_block1"]["attention"]["squeeze"]["kernel"].shape == (128, 8)


def test_sk_takes_the_place_of_the_3x3():
    block = shapes_of(create_model("resnext50_32x4d", attention="sk", stage_sizes=(1, 1), features=16))["params"]
    assert set(block["stage2_block1"]) == {
        "conv1", "norm1", "attention", "conv3", "norm3", "downsample_conv", "downsample_norm"
    }  # fmt: skip
    assert block["stage2_block1"]["attention"]["branch2_conv"]["kernel"].shape == (3, 3, 2, 64)  # 32 groups


def test_sk_takes_the_place_of_a_basic_blocks_first_3x3():
    """As in timm's skresnet18; the second one feeds the sum."""
    variables = shapes_of(create_model("resnet18", attention="sk", stage_sizes=(1, 1), features=16))
    block = variables["params"]["stage2_block1"]
    assert set(block) == {"attention", "conv2", "norm2", "downsample_conv", "downsample_norm"}
    assert block["attention"]["branch1_conv"]["kernel"].shape == (3, 3, 16, 32)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "norm2"), ("resnet50", "norm3")])
def test_a_block_may_start_as_the_identity(name, last):
    model = create_model(name, stage_sizes=(1,), features=8, zero_init_residual=True)
    block = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]["stage1_block1"]
    assert {norm for norm in block if "norm" in norm and not block[norm]["scale"].any()} == {last}


def test_sk_in_a_resnet_has_the_groups_of_its_3x3_or_its_own():
    small = {"stage_sizes": (1,), "features": 16}

    def kernel(**options):
        model = create_model("resnet50", attention="sk", attention_options=options, **small)
        return shapes_of(model)["params"]["stage1_block1"]["attention"]["branch1_conv"]["kernel"].shape

    assert kernel() == (3, 3, 16, 16)
    assert kernel(groups=4) == (3, 3, 4, 16)


def test_wide_resnet_widens_the_3x3_only():
    block = shapes_of(create_model("wide_resnet50_2", stage_sizes=(1,)))["params"]["stage1_block1"]
    assert block["conv2"]["kernel"].shape == (3, 3, 128, 128)
    assert block["conv3"]["kernel"].shape == (1, 1, 128, 256)


def test_rates_are_checked():
    check_rate("dropout", 0.0)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout="):
            check_rate("dropout", rate)


def test_the_rate_rises_with_the_depth():
    np.testing.assert_allclose(depth_rates(0.2, 4), [0.05, 0.1, 0.15, 0.2])


class Drop(nn.Module):
    @nn.compact
    def __call__(self, y, train):
        return survival_drop(y, 0.3, train)


def test_whole_images_lose_the_branch_and_the_others_make_up_for_it():
    y = jnp.asarray(np.random.RandomState(0).uniform(1, 2, (4000, 2, 3, 2)), jnp.float32)
    np.testing.assert_array_equal(Drop().apply({}, y, False), y)
    kept = np.asarray(Drop().apply({}, y, True, rngs={"dropout": jax.random.key(0)})) / y
    per_image = kept.reshape(4000, -1)
    assert ((per_image == 0).all(axis=1) | np.isclose(per_image, 1 / 0.7, rtol=1e-5).all(axis=1)).all()
    assert (per_image[:, 0] == 0).mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("resnet18", "stochastic_depth"),
        ("resnet18", "dropout"),
        ("resnet50", "stochastic_depth"),
        ("cifar_resnet8", "stochastic_depth"),
        ("cifar_preact_resnet11_bottleneck", "stochastic_depth"),
    ],
)
def test_dropping_adds_no_parameter_and_draws_in_training_only(name, rate):
    size = {} if name.startswith("cifar") else {"stage_sizes": (1, 1)}
    plain, dropped = (create_model(name, features=4, num_classes=3, **size, **o) for o in ({}, {rate: 0.5}))
    x = jnp.ones((2, 32, 32, 3))
    tree = lambda model: jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0), x))
    assert tree(plain) == tree(dropped)
    variables = jax.eval_shape(dropped.init, jax.random.key(0), x)
    jax.eval_shape(partial(dropped.apply, train=False), variables, x)
    train = partial(dropped.apply, train=True, mutable=["batch_stats"])
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(train, variables, x)
    text = jax.jit(partial(train, rngs={"dropout": jax.random.key(0)})).lower(variables, x).as_text()
    assert text.count("threefry") + text.count("rng_bit_generator") > 0


@pytest.mark.medium
@pytest.mark.parametrize("reduced_channels", [8, None])
def test_what_the_block_hands_over_changes_nothing_but_the_cost(reduced_channels):
    """In float64, values, statistics and all gradients: with the source of the map, and with the map alone."""
    hga = partial(HGA, reduced_channels=reduced_channels, kernels=(1, 3), bins=(1, 2), dtype=jnp.float64)
    by_map = lambda channels, name: hga(channels, name=name)  # says nothing of `uses_source`
    assert uses_source(hga) and not uses_source(by_map)

    class Derived(HGA):
        @nn.compact
        def __call__(self, x, train=False):
            return 2 * super().__call__(x, train)

    assert not uses_source(Derived)  # whose author knows of (x, train) alone
    conv = partial(nn.Conv, use_bias=False, padding=0, dtype=jnp.float64)
    norm = partial(BatchNorm, False, dtype=jnp.float64)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.RandomState(0).standard_normal((3, 6, 5, 8)))
        shapes = jax.eval_shape(lambda: Bottleneck(4, 4, conv, norm, hga).init(jax.random.key(0), x, True))
        draw = np.random.RandomState(1).standard_normal
        variables = jax.tree.map(lambda s: jnp.asarray(0.3 + draw(s.shape)), shapes)
        stats = variables["batch_stats"]

        def result(attention):
            def loss(params, x):
                block = Bottleneck(4, 4, conv, norm, attention)
                y, updates = block.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
                return jnp.sin(y).sum(), (y, updates)

            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

        functions = [result(attention) for attention in (hga, by_map)]
        assert len({str(jax.make_jaxpr(f)(variables["params"], x)) for f in functions}) == 2
        results = [f(variables["params"], x) for f in functions]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", "googlenet", "densenet121", "vgg11"])
def test_one_image_is_no_batch(name):
    images = jax.ShapeDtypeStruct((64, 64, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"a network needs images \[B, H, W, C\], not \[64, 64, 3\]"):
        jax.eval_shape(create_model(name, num_classes=3).init, jax.random.key(0), images)


@pytest.mark.medium
@pytest.mark.parametrize("attention", ["none", "hga"])
def test_a_batch_on_explicit_axes_has_the_gradients_of_one_device(attention):
    """`jax.make_mesh` makes such axes; with them JAX refuses gradients that do not say how they are split."""
    with jax.enable_x64(True):
        model = create_model(
            "resnet18", attention=attention, num_classes=3, stage_sizes=(1, 1), features=8, dtype=jnp.float64
        )
        images = jnp.asarray(np.random.RandomState(0).standard_normal((4, 32, 32, 3)))
        variables = jax.jit(model.init)(jax.random.key(0), images)

        def loss(params, statistics, images):
            variables = {"params": params, "batch_stats": statistics}
            logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return (logits**2).mean()

        gradient = jax.grad(loss)
        expected = jax.jit(gradient)(variables["params"], variables["batch_stats"], images)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
        with jax.set_mesh(mesh):
            replicated = jax.device_put(variables, NamedSharding(mesh, P()))
            split = jax.device_put(images, NamedSharding(mesh, P("data")))
            found = jax.jit(gradient)(replicated["params"], replicated["batch_stats"], split)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-7)
