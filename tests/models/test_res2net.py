"""res2net50_26w_4s and others are compared with timm's by the goldens (tests/test_goldens_models.py)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.models import create_model
from tests.reference import batch_norm, convolution, relative_error, relu, sample

SMALL = {"stage_sizes": (2,), "features": 64, "num_classes": 3}


def block_of(**options):
    model = create_model("res2net50_26w_4s", **SMALL | options)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]["stage1_block2"]


def test_the_3x3s_are_one_fewer_than_the_groups():
    block = block_of(attention="se")
    assert {name for name in block if name.startswith("conv2")} == {"conv2_1", "conv2_2", "conv2_3"}
    assert block["conv1"]["kernel"].shape == (1, 1, 256, 4 * 26)
    assert block["conv2_3"]["kernel"].shape == (3, 3, 26, 26)
    assert block["attention"]["squeeze"]["kernel"].shape == (256, 16)
    assert {name for name in block_of(scale=1) if name.startswith("conv2")} == {"conv2_1"}


@pytest.mark.medium
def test_each_3x3_reads_what_the_one_before_it_made():
    """In NumPy, a block that is not its stage's first; that one is what the goldens' first blocks show."""
    model = create_model("res2net50_26w_4s", **SMALL, scale=3, width_per_group=4)
    images = jnp.asarray(sample((1, 16, 16, 3)))

    @jax.jit
    def apply(variables):
        seen = {}

        def watch(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if context.module.path == ("stage1_block2",) and context.method_name == "__call__":
                seen["x"], seen["y"] = args[0], result
            return result

        with nn.intercept_methods(watch):
            model.apply(variables, images)
        return seen

    variables = jax.jit(model.init)(jax.random.key(0), images)
    seen = apply(variables)
    params, statistics = (variables[kind]["stage1_block2"] for kind in ("params", "batch_stats"))
    conv = lambda y, name, margin=0: convolution(y, params[f"conv{name}"]["kernel"], 1, margin=margin)
    norm = lambda y, name: batch_norm(y, params[f"norm{name}"], statistics[f"norm{name}"])
    x = np.asarray(seen["x"])
    first, second, third = np.split(relu(norm(conv(x, "1"), "1")), 3, axis=-1)
    a = relu(norm(conv(first, "2_1", 1), "2_1"))
    b = relu(norm(conv(a + second, "2_2", 1), "2_2"))
    y = norm(conv(np.concatenate([a, b, third], axis=-1), "3"), "3")
    assert relative_error(seen["y"], relu(x + y)) < 1e-5


def test_refuses_a_scale_out_of_range():
    with pytest.raises(ValueError, match="scale=0 is not positive"):
        block_of(scale=0)
