"""The main head is compared with torchvision's by the goldens (tests/test_goldens_models.py)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.models import create_model
from hga_flax.models.googlenet import BLOCKS, max_pool_ceil
from tests.reference import sample

SMALL = {"width_divisor": 8, "num_classes": 5}


def shapes_of(model, size=64):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize(
    ("size", "length", "expected"), [(3, 112, 56), (3, 7, 3), (3, 8, 4), (2, 7, 4), (2, 1, 1), (3, 2, 1)]
)
def test_max_pooling_keeps_the_last_partial_window(size, length, expected):
    x = sample((1, length, length, 2))
    y = np.asarray(max_pool_ceil(jnp.asarray(x), size))
    assert y.shape == (1, expected, expected, 2)
    for i in range(expected):
        for j in range(expected):
            window = x[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size]
            np.testing.assert_allclose(y[:, i, j], window.max(axis=(1, 2)), rtol=1e-6)


def test_attention_sits_on_every_concatenation():
    params = shapes_of(create_model("googlenet", attention="se"))["params"]
    widths = [params[f"inception{block}"]["attention"]["excite"]["bias"].shape[0] for block in BLOCKS]
    assert widths == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


@pytest.mark.medium
def test_auxiliary_logits_are_sown_in_training_only():
    model = create_model("googlenet", aux_logits=True, **SMALL)
    variables = shapes_of(model)
    assert set(variables) == {"params", "batch_stats"}
    x = jnp.zeros((2, 64, 64, 3))
    collections = ["batch_stats", "aux_logits"]
    train = partial(model.apply, train=True, mutable=collections, rngs={"dropout": jax.random.key(0)})
    logits, updated = jax.eval_shape(train, variables, x)
    assert logits.shape == (2, 5)
    assert {name: sown[0].shape for name, sown in updated["aux_logits"].items()} == {
        "auxiliary1_logits": (2, 5),
        "auxiliary2_logits": (2, 5),
    }
    # A caller that does not ask for them gets the logits alone, and inference has none.
    logits, updated = jax.eval_shape(partial(train, mutable=["batch_stats"]), variables, x)
    assert set(updated) == {"batch_stats"}
    _, updated = jax.eval_shape(partial(model.apply, mutable=collections), variables, x)
    assert "aux_logits" not in updated


def test_third_branch_is_3x3_unless_asked():
    for true_5x5, size in ((False, 3), (True, 5)):
        params = shapes_of(create_model("googlenet", true_5x5=true_5x5, **SMALL))["params"]
        assert params["inception3a"]["branch3"]["conv"]["kernel"].shape[:2] == (size, size)


@pytest.mark.parametrize("options", [{"width_divisor": 3}, {"width_divisor": 0}, {"dropout": 1.5}, {"aux_dropout": -1}])
def test_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        shapes_of(create_model("googlenet", **options))
