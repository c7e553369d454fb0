import jax
import jax.numpy as jnp
import pytest

from hga_flax.models import create_model
from hga_flax.models.resnet import check_rate


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
