"""resnest50d and others are compared with timm's by the goldens (tests/test_goldens_models.py)."""

import jax
import jax.numpy as jnp
import pytest

from hga_flax.models import create_model
from hga_flax.models.resnest import hidden_width


def params_of(name="resnest50d", **options):
    model = create_model(name, **{"stage_sizes": (1, 1), "features": 16, "num_classes": 3} | options)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


def test_the_hidden_width_is_timms():
    # The channels times radix of every network of the family, and a width that rounding to 8 would lower by a tenth.
    assert [hidden_width(c) for c in (128, 256, 512, 1024)] == [32, 64, 128, 256]
    assert [hidden_width(c) for c in (96, 160, 192, 320, 384, 768, 1280)] == [32, 40, 48, 80, 96, 192, 320]
    assert hidden_width(143) == 40  # 32 would be less than nine tenths of 35.75


def test_the_attention_follows_the_last_norm_beside_the_split_attention():
    block = params_of(attention="se")["stage2_block1"]
    assert set(block) == {
        "conv1", "norm1", "split_attention", "conv3", "norm3", "attention", "downsample_conv", "downsample_norm",
    }  # fmt: skip
    assert block["attention"]["excite"]["bias"].shape == (128,)
    assert block["split_attention"]["conv"]["kernel"].shape == (3, 3, 16, 64)  # two maps, two groups


def test_the_stem_is_three_3x3s():
    params = params_of("resnest101e")
    assert [params[f"stem_conv{i}"]["kernel"].shape for i in (1, 2, 3)] == [
        (3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 64, 128),
    ]  # fmt: skip
    assert "stem_conv" in params_of(stem_width=0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"radix": 0}, "radix=0"),
        ({"stem_width": -1}, "stem_width=-1"),
        ({"radix": 3}, "radix=3 times cardinality=1 does not divide the 16 channels"),
        ({"width_per_group": 3}, "width_per_group=3 leaves no channel at features=16"),
    ],
)
def test_refuses_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        params_of(**option)
