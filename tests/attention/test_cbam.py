import numpy as np
import pytest

from hga_flax.attention import ConvolutionalBlockAttention
from tests.reference import (
    applied,
    batch_norm,
    convolution,
    dense,
    parameter_count,
    relative_error,
    relu,
    sample,
    sigmoid,
)


def channel_gated(x, params):
    def mlp(pooled):
        return dense(relu(dense(pooled, params["squeeze"])), params["excite"])

    return x * sigmoid(mlp(x.mean(axis=(1, 2))) + mlp(x.max(axis=(1, 2))))[:, None, None, :]


def test_equals_the_equations():
    x = sample((2, 6, 5, 16))
    y, params, statistics = applied(ConvolutionalBlockAttention(16, ratio=4, kernel_size=3, bias=True), x)
    z = channel_gated(x, params)
    planes = np.stack([z.mean(axis=-1), z.max(axis=-1)], axis=-1)
    e = convolution(planes, params["spatial_conv"]["kernel"], margin=1)
    e = batch_norm(e, params["spatial_norm"], statistics["spatial_norm"])
    assert relative_error(y, z * sigmoid(e)) < 1e-5


def test_without_the_spatial_gate():
    x = sample((2, 4, 4, 16))
    y, params, _ = applied(ConvolutionalBlockAttention(16, ratio=4, spatial=False), x)
    assert relative_error(y, channel_gated(x, params)) < 1e-6


def test_cost_formula():
    assert parameter_count(ConvolutionalBlockAttention(256), (1, 4, 4, 256)) == 2 * 256 * 16 + 2 * 49 + 2


def test_refuses_an_even_kernel():
    with pytest.raises(ValueError, match="kernel_size=2 must be odd"):
        applied(ConvolutionalBlockAttention(8, kernel_size=2), np.zeros((1, 2, 2, 8)))
