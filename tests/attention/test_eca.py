import numpy as np
import pytest

from hga_flax.attention import EfficientChannelAttention
from hga_flax.attention.eca import adaptive_kernel_size
from tests.reference import applied, relative_error, sample, sigmoid


@pytest.mark.parametrize("circular", [False, True])
def test_equals_a_sliding_sum(circular):
    x = sample((2, 3, 4, 10))
    y, params, _ = applied(EfficientChannelAttention(10, kernel_size=5, circular=circular), x)
    means, kernel = x.mean(axis=(1, 2)), params["kernel"][:, 0]
    e = np.zeros_like(means)
    for c in range(10):
        for tap in range(5):
            neighbour = c + tap - 2
            if circular or 0 <= neighbour < 10:
                e[:, c] += kernel[tap] * means[:, neighbour % 10]
    assert relative_error(y, x * sigmoid(e)[:, None, None, :]) < 1e-6


def test_kernel_sizes_of_resnet50():
    # 3 * 5 + 4 * 5 + 6 * 5 + 3 * 7 = 86, timm's count.
    assert [adaptive_kernel_size(c) for c in (16, 64, 256, 512, 1024, 2048)] == [3, 3, 5, 5, 5, 7]


def test_refuses_an_even_kernel():
    with pytest.raises(ValueError, match="kernel_size=4 must be odd"):
        applied(EfficientChannelAttention(8, kernel_size=4), np.zeros((1, 2, 2, 8)))
