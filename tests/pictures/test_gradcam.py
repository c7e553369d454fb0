"""Grad-CAM against the gradient by hand: in NumPy where the head is linear, by finite differences where it is not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.models import create_model
from hga_flax.pictures.gradcam import last_map, look
from tests.reference import sample


class Net(nn.Module):
    """A map, and a head that is not linear in it."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(3, (3, 3), name="trunk")(x)
        return nn.Dense(4, name="classifier")(jnp.tanh((x**2).mean(axis=(1, 2)) + x[:, 0, 0]))


def by_differences(a, kernel, chosen, step=1e-4):
    """Eqs. 1-2 for one map `[h, w, C]` in float64."""

    def score(a):
        return np.tanh((a**2).mean(axis=(0, 1)) + a[0, 0]) @ kernel[:, chosen]

    gradient = np.zeros_like(a)
    for place in np.ndindex(a.shape):
        moved = np.zeros_like(a)
        moved[place] = step
        gradient[place] = (score(a + moved) - score(a - moved)) / (2 * step)
    return np.maximum((gradient.mean(axis=(0, 1)) * a).sum(axis=-1), 0)


def test_equals_finite_differences():
    x = sample((2, 5, 4, 2))
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    classes = np.array([2, 0])
    seen = look(model, variables, x, classes)
    trunk = np.asarray(nn.Conv(3, (3, 3)).apply({"params": variables["params"]["trunk"]}, x), np.float64)
    kernel = np.asarray(variables["params"]["classifier"]["kernel"], np.float64)
    expected = np.stack([by_differences(a, kernel, chosen) for a, chosen in zip(trunk, classes, strict=True)])
    assert seen.layer == "trunk" and seen.cams.shape == (2, 5, 4) and expected.max() > 0
    np.testing.assert_allclose(seen.cams, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_network_that_pools_its_last_map():
    """There Grad-CAM is CAM: the weights of Eq. 1 are the classifier's, over the number of positions."""
    model = create_model("cifar_resnet8", attention="hga", num_classes=5, features=4)
    x = sample((3, 16, 16, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    seen = look(model, variables, x)
    capture = lambda variables: model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
    logits, state = jax.jit(capture)(variables)
    (a,) = state["intermediates"]["stage3_block1"]["__call__"]
    weights = np.asarray(variables["params"]["classifier"]["kernel"])[:, np.asarray(logits).argmax(axis=-1)]
    expected = np.maximum(np.einsum("bhwc,cb->bhw", a, weights) / (4 * 4), 0)
    np.testing.assert_allclose(seen.logits, logits, rtol=1e-5, atol=1e-5)  # the network is called as it is
    assert (seen.classes == logits.argmax(axis=-1)).all() and seen.layer == "stage3_block1"
    np.testing.assert_allclose(seen.cams, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_behind_the_last_block_is_not_asked():
    model = create_model("cifar_preact_resnet8", num_classes=5, features=4)
    x = sample((1, 8, 8, 1))
    assert last_map(model, jax.eval_shape(model.init, jax.random.key(1), x), x) == ("stage3_block1", (1, 2, 2, 16))


def test_a_network_without_a_map_is_refused():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(2)(x.reshape(len(x), -1))

    x = sample((1, 2, 2, 1))
    with pytest.raises(UserError, match="none of its modules returns a map"):
        look(Flat(), Flat().init(jax.random.key(0), x), x)
