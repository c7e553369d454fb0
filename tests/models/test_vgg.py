"""vgg16_bn and others are compared with torchvision's and timm's by the goldens (tests/test_goldens_models.py)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from hga_flax.models import create_model
from tests.reference import sample

SMALL = {"stage_sizes": (1, 2), "features": 8, "hidden": 16, "num_classes": 3}


def shapes_of(model, size=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def test_the_attention_acts_on_what_a_stage_hands_on():
    params = shapes_of(create_model("vgg16_bn", attention="se", features=16, hidden=8))["params"]
    widths = [params[f"stage{i}"]["attention"]["excite"]["bias"].shape[0] for i in range(1, 6)]
    assert widths == [16, 32, 64, 128, 128]
    model = create_model("vgg11", attention="se", **SMALL)

    @jax.jit
    def seen(images):
        maps = []

        def watch(call, args, kwargs, context):
            if context.module.path[-1:] == ("attention",) and context.method_name == "__call__":
                maps.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            model.init(jax.random.key(0), images)
        return maps

    maps = seen(jnp.asarray(sample((1, 32, 32, 3))))
    assert [x.shape for x in maps] == [(1, 32, 32, 8), (1, 16, 16, 16)]  # before the pooling
    assert all(x.min() == 0 for x in maps)  # after the ReLU


def test_convolutions_have_biases_and_norms_where_the_name_says_so():
    for name, has_norm in (("vgg11", False), ("vgg11_bn", True)):
        variables = shapes_of(create_model(name, **SMALL))
        stage = variables["params"]["stage2"]
        assert set(stage) == {"conv1", "conv2"} | ({"norm1", "norm2"} if has_norm else set())
        assert "bias" in stage["conv1"] and ("batch_stats" in variables) == has_norm


@pytest.mark.parametrize("size", [32, 64, 96, 100])
def test_every_image_size_fits(size):
    model = create_model("vgg11_bn", **SMALL | {"stage_sizes": (1, 1, 1, 1, 1)})
    y, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, size, size, 3)))
    assert y.shape == (2, 3) and variables["params"]["hidden1"]["kernel"].shape == (49 * 64, 16)


@pytest.mark.parametrize(("sizes", "image", "least"), [((1, 1, 2, 2, 2), 28, 32), ((1, 1), 3, 4)])
def test_images_of_which_nothing_is_left_are_refused(sizes, image, least):
    """The logits would be the biases, whatever the image."""
    with pytest.raises(ValueError, match=f"^images of {image}x{image}: this VGG needs at least {least}x{least}"):
        jax.eval_shape(
            create_model("vgg11_bn", **SMALL | {"stage_sizes": sizes}).init,
            jax.random.key(0),
            jnp.zeros((2, image, image, 3)),
        )


def test_dropout_needs_a_rng_in_training_only():
    model = create_model("vgg11_bn", **SMALL)
    variables, x = shapes_of(model), jnp.zeros((2, 32, 32, 3))
    jax.eval_shape(partial(model.apply, train=False), variables, x)
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(partial(model.apply, train=True, mutable=["batch_stats"]), variables, x)
    with pytest.raises(ValueError, match="dropout=1"):
        shapes_of(create_model("vgg11_bn", **SMALL, dropout=1.0))
