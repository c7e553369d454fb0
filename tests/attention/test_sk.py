import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import SelectiveKernel, attention_factory, replaces_convolution
from hga_flax.attention.sk import select_channels
from tests.reference import (
    applied,
    batch_norm,
    convolution,
    dense,
    parameter_count,
    relative_error,
    relu,
    sample,
    softmax,
)


@pytest.mark.parametrize(("stride", "groups", "dilations"), [(1, 2, (1, 2)), (2, 1, (1, 2, 3))])
def test_equals_the_equations(stride, groups, dilations):
    x = sample((2, 6, 5, 4))
    module = SelectiveKernel(8, ratio=2, min_channels=3, dilations=dilations, groups=groups, stride=stride)
    y, params, statistics = applied(module, x)
    branches = []
    for i, dilation in enumerate(dilations, start=1):
        z = convolution(x, params[f"branch{i}_conv"]["kernel"], stride, dilation, dilation, groups)
        branches.append(relu(batch_norm(z, params[f"branch{i}_norm"], statistics[f"branch{i}_norm"])))
    e = dense(sum(branches).mean(axis=(1, 2)), params["reduce"])
    e = dense(relu(batch_norm(e, params["reduce_norm"], statistics["reduce_norm"])), params["select"])
    assert params["reduce"]["kernel"].shape[1] == 4
    weights = softmax(e.reshape(2, len(dilations), 8), axis=1)
    expected = sum(branch * weights[:, i, None, None, :] for i, branch in enumerate(branches))
    assert relative_error(y, expected) < 1e-5


def test_hidden_size_is_32_but_in_the_last_stage_of_sknet50():
    assert [select_channels(c, 16, 32) for c in (128, 256, 512, 1024)] == [32, 32, 32, 64]


def test_cost_formula():
    channels, d = 128, 32
    expected = 2 * (9 * channels * 4 + 2 * channels) + channels * d + 2 * d + 2 * d * channels
    assert parameter_count(SelectiveKernel(channels, groups=32), (1, 4, 4, channels)) == expected


def test_groups_follow_the_replaced_convolution_unless_given():
    shape = (1, 4, 4, 64)
    dense_count = parameter_count(SelectiveKernel(64), shape)
    grouped = parameter_count(SelectiveKernel(64, replaced_groups=32), shape)
    assert dense_count - grouped == 2 * 9 * 64 * (64 - 2)
    assert parameter_count(SelectiveKernel(64, groups=32), shape) == grouped


def test_only_sk_replaces_a_convolution():
    assert replaces_convolution(attention_factory("sk"))
    assert not any(replaces_convolution(attention_factory(name)) for name in ("none", "hga", "se", "ge"))


@pytest.mark.parametrize(
    "options", [{"groups": 3}, {"groups": 0}, {"dilations": ()}, {"dilations": (0,)}, {"min_channels": 0}, {"ratio": 0}]
)
def test_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        applied(SelectiveKernel(8, **options), np.zeros((1, 4, 4, 8)))


def test_output_has_the_size_of_the_3x3_it_replaces():
    for size in (1, 4, 5):
        module = SelectiveKernel(4, stride=2)
        y, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.ones((1, size, size, 4)))
        assert y.shape == (1, (size + 1) // 2, (size + 1) // 2, 4)
