"""The goldens do not reach these networks: a block is compared with the papers' order of layers, in NumPy."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import attention_factory
from hga_flax.models import create_model
from hga_flax.models.cifar_resnet import SmallBlock, blocks_per_stage, wide_depth
from tests.reference import applied, batch_norm, convolution, relative_error, relu, sample


class Inference(nn.Module):
    """A block with its usual conv and norm, in inference."""

    options: dict

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False, padding=0)
        norm = partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
        return SmallBlock(4, conv, norm, attention_factory("none"), **self.options, name="block")(x, False)


def reference(x, params, statistics, preact, bottleneck, shortcut, stride):
    def norm(y, name):
        return batch_norm(y, params[name], statistics[name])

    sizes = [1, 3, 1] if bottleneck else [3, 3]
    y = x
    for i, size in enumerate(sizes, start=1):
        if preact:
            y = relu(norm(y, f"norm{i}"))
            first = y if i == 1 else first  # noqa: F821
        y = convolution(y, params[f"conv{i}"]["kernel"], stride if i == 1 else 1, margin=size // 2)
        if not preact:
            y = norm(y, f"norm{i}")
            y = relu(y) if i < len(sizes) else y
    changes = stride > 1 or x.shape[-1] != y.shape[-1]
    if changes:
        x = first if preact else x
        if shortcut == "A":
            x = x[:, ::stride, ::stride]
            x = np.concatenate([x, np.zeros((*x.shape[:3], y.shape[-1] - x.shape[-1]))], axis=-1)
        else:
            x = convolution(x, params["downsample_conv"]["kernel"], stride)
            x = x if preact else norm(x, "downsample_norm")
    return x + y if preact else relu(x + y)


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize(
    ("bottleneck", "shortcut", "stride", "channels"),
    [(False, "B", 2, 3), (False, "A", 2, 3), (True, "B", 1, 3), (False, "B", 1, 4)],
)
def test_blocks_follow_the_papers(preact, bottleneck, shortcut, stride, channels):
    options = {"preact": preact, "bottleneck": bottleneck, "shortcut": shortcut, "stride": stride}
    x = sample((2, 5, 6, channels))
    y, params, statistics = applied(Inference(options), x)
    expected = reference(x, params["block"], statistics["block"], **options)
    assert relative_error(y, expected) < 1e-5


def test_depths():
    assert [blocks_per_stage(110, False), blocks_per_stage(164, True)] == [18, 18]
    assert wide_depth(28) == 26
    with pytest.raises(ValueError, match="the nearest are 110 and 116"):
        blocks_per_stage(112, False)
    with pytest.raises(ValueError, match="the nearest are 10 and 16"):
        wide_depth(4)


@pytest.mark.parametrize(
    ("name", "missing"), [("cifar_preact_resnet8", "conv1"), ("cifar_resnet11_bottleneck", "conv2")]
)
def test_sk_takes_the_place_of_the_convolution_that_feeds_a_relu(name, missing):
    model = create_model(name, attention="sk", features=4)
    block = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["stage2_block1"]
    assert "attention" in block
    convolutions = {"conv1", "conv2", "conv3"} if "bottleneck" in name else {"conv1", "conv2"}
    assert {layer for layer in block if layer.startswith("conv")} == convolutions - {missing}
    # In pre-activation the norm before SK stays; in post-activation SK brings its own.
    assert ("norm" + missing[-1] in block) == ("preact" in name)


def test_se_leaves_one_hidden_channel_at_width_16():
    model = create_model("cifar_preact_resnet8", attention="se")
    block = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["stage1_block1"]
    assert block["attention"]["squeeze"]["kernel"].shape == (16, 1)


def test_dropout_needs_a_rng_in_training_only():
    model = create_model("cifar_wide_resnet10_1", features=4, dropout=0.3, num_classes=3)
    x = jnp.ones((2, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    jax.eval_shape(partial(model.apply, train=False), variables, x)
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(partial(model.apply, train=True, mutable=["batch_stats"]), variables, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "C"}, "shortcut="),
        ({"widen": 0}, "widen="),
        ({"dropout": 1.0}, "dropout="),
        ({"stochastic_depth": -0.1}, "stochastic_depth="),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        model = create_model("cifar_resnet8", **options)
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
