import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention.common import at_least_float32, check_map, gated, global_mean, hidden_channels
from tests.reference import sample, sigmoid


@pytest.mark.parametrize(
    ("channels", "ratio", "hidden"),
    [(256, 16, 16), (2048, 16, 128), (480, 16, 30), (528, 16, 33), (16, 16, 1), (8, 16, 1)],
)
def test_hidden_channels_are_a_fraction_and_never_none(channels, ratio, hidden):
    assert hidden_channels(channels, ratio) == hidden


def test_hidden_channels_refuses_a_ratio_of_zero():
    with pytest.raises(ValueError, match="ratio=0"):
        hidden_channels(64, 0)


def test_check_map_names_the_module_and_the_shape():
    with pytest.raises(ValueError, match=r"SE\(8\) needs a map \[B, H, W, 8\], not \[2, 3, 3, 4\]"):
        check_map("SE", jnp.zeros((2, 3, 3, 4)), 8)


def test_gate_and_mean_are_float32_for_bfloat16_maps():
    x = jnp.ones((1, 64, 64, 2), jnp.bfloat16)
    assert global_mean(x).dtype == jnp.float32
    assert float(global_mean(x)[0, 0]) == 1.0  # a bfloat16 sum stops growing at 256
    assert gated(x, jnp.zeros((1, 1, 1, 2), jnp.bfloat16)).dtype == jnp.bfloat16
    assert at_least_float32(x).dtype == jnp.float32


def test_gated_multiplies_by_the_sigmoid():
    x, e = sample((2, 3, 3, 4)), sample((2, 1, 1, 4), seed=1)
    np.testing.assert_allclose(
        gated(jnp.asarray(x, jnp.float32), jnp.asarray(e, jnp.float32)), x * sigmoid(e), rtol=1e-5
    )
