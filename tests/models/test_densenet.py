"""densenet121 is compared with torchvision's by the goldens (tests/test_goldens_models.py)."""

import jax
import jax.numpy as jnp
import pytest

from hga_flax.models import create_model

SMALL = {"block_sizes": (2, 1), "growth": 8, "features": 16}


def params_of(model, size=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]


def test_layers_add_growth_channels_and_transitions_halve():
    params = params_of(create_model("densenet121", **SMALL))
    assert params["block1_layer2"]["conv1"]["kernel"].shape == (1, 1, 24, 32)
    assert params["block1_layer2"]["conv2"]["kernel"].shape == (3, 3, 32, 8)
    assert params["transition1_conv"]["kernel"].shape == (1, 1, 32, 16)
    assert params["final_norm"]["scale"].shape == (24,)


def test_attention_sees_the_new_features_alone():
    params = params_of(create_model("densenet121", attention="se", **SMALL))
    layers = [name for name in params if "_layer" in name]
    assert len(layers) == 3
    assert all(params[name]["attention"]["excite"]["bias"].shape == (8,) for name in layers)


@pytest.mark.parametrize("size", [8, 33])
def test_runs_on_small_and_odd_maps(size):
    model = create_model("densenet121", num_classes=3, **SMALL)
    y, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, size, size, 3)))
    assert y.shape == (2, 3)


def test_refuses_a_rate_out_of_range():
    with pytest.raises(ValueError, match="dropout=2"):
        params_of(create_model("densenet121", dropout=2, **SMALL))
