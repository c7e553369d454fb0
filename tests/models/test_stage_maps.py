import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.models import create_model
from hga_flax.models.stage_maps import StageInfo

SMALL = {
    "resnet18": {"stage_sizes": (2, 1, 1, 1), "features": 4},
    "resnet50": {"stage_sizes": (2, 1), "features": 4, "attention": "hga", "attention_options": {"kernels": (1, 3)}},
    "resnext50_32x4d": {"stage_sizes": (1, 2), "features": 64, "attention": "se"},
    "cifar_resnet14": {"features": 4},
    "cifar_preact_resnet20_bottleneck": {"features": 4},
    "cifar_wide_resnet10_2": {"features": 4},
    "googlenet": {"width_divisor": 8},
    "densenet121": {"block_sizes": (2, 1), "features": 8, "growth": 4},
    "vgg11_bn": {"features": 4, "hidden": 8},
    "res2net50_26w_4s": {"stage_sizes": (1, 1), "features": 16},
    "resnest50d": {"stage_sizes": (1, 1), "features": 16, "stem_width": 4},
}


@pytest.mark.medium
@pytest.mark.parametrize("name", SMALL)
def test_the_maps_are_the_whole_networks(name):
    """Its outputs at the named parts, in the shapes that are told, with the same variables."""
    whole, backbone = (create_model(name, num_classes=3, **SMALL[name], features_only=f) for f in (False, True))
    images = jnp.asarray(np.random.RandomState(0).standard_normal((2, 64, 64, 3)), jnp.float32)
    shapes = dict(jax.eval_shape(whole.init, jax.random.key(0), images))
    assert shapes == dict(jax.eval_shape(backbone.init, jax.random.key(0), images))
    draws = np.random.RandomState(1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(draws.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes)

    @jax.jit
    def both(variables, images):
        _, captured = whole.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
        return backbone.apply(variables, images), captured["intermediates"]

    maps, parts = both(variables, images)
    info = backbone.feature_info()
    assert len(maps) == len(info) >= 2
    for found, told in zip(maps, info, strict=True):
        assert found.shape == (2, 64 // told.stride, 64 // told.stride, told.channels)
        expected = parts[told.name]["__call__"][0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.isfinite(expected).all() and np.ptp(expected) > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [(64, 4), (128, 8), (256, 16), (512, 32)]),
        ("resnet50", [(256, 4), (512, 8), (1024, 16), (2048, 32)]),
        ("cifar_resnet20", [(16, 1), (32, 2), (64, 4)]),
        ("cifar_wide_resnet16_4", [(64, 1), (128, 2), (256, 4)]),
        ("googlenet", [(480, 8), (832, 16), (1024, 32)]),
        pytest.param("densenet121", [(256, 4), (512, 8), (1024, 16), (1024, 32)], marks=pytest.mark.slow),
        ("vgg16_bn", [(64, 2), (128, 4), (256, 8), (512, 16), (512, 32)]),
    ],
)
def test_channels_and_strides(name, expected):
    found = create_model(name, features_only=True, axis_name="data").feature_info()
    assert [(info.channels, info.stride) for info in found] == expected
    assert isinstance(found[0], StageInfo) and len({info.name for info in found}) == len(expected)


@pytest.mark.medium
def test_training_moves_the_statistics_within_another_network():
    """As part of a detector: in a module of its own, with batch statistics that are updated."""
    import flax.linen as nn

    class Detector(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(2, name="head")(self.backbone(x, train)[-1])

    detector = Detector(create_model("cifar_resnet8", features=4, num_classes=3, features_only=True))
    images = jnp.ones((2, 16, 16, 3))
    variables = detector.init(jax.random.key(0), images)
    assert {"stem_conv", "stage3_block1"} < set(variables["params"]["backbone"]) and "head" in variables["params"]
    y, changed = detector.apply(variables, images, train=True, mutable=["batch_stats"])
    assert y.shape == (2, 4, 4, 2)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), changed["batch_stats"], variables["batch_stats"])
    assert not any(jax.tree.leaves(same["backbone"]["stem_norm"]["mean"]))
