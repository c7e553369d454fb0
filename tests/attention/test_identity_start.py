import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from hga_flax.attention import HGA, attention_factory, attention_names, attention_options, create_attention
from hga_flax.attention.identity_start import SHARE
from hga_flax.models.resnet import ResNet
from tests.reference import sample

NAMES = [name for name in attention_names() if "identity_start" in attention_options(name)]
X = jnp.asarray(sample((2, 8, 8, 64)), jnp.float32)
IMAGES = jnp.asarray(sample((4, 16, 16, 3)), jnp.float32)
SMALL = {"reduced_channels": 8, "kernels": (1, 3), "bins": (1, 2)}


def network(name, **options):
    """One bottleneck, which hands over a `Source` in training."""
    return ResNet((1,), num_classes=5, attention=attention_factory(name, **options), features=4, width_per_group=64)


def module_of(name, **options):
    """A module for X, of HGA a small one that reduces and restores."""
    return create_attention(name, 64, **(SMALL if name.startswith("hga") else {}), **options)


def fresh(model, *arguments):
    variables = jax.jit(model.init)(jax.random.key(1), *arguments)
    return {k: v for k, v in variables.items() if k != "intermediates"}


def test_all_that_follow_a_norm_have_the_option_and_not_by_default():
    assert set(attention_names()) - set(NAMES) == {"none", "sk"}
    assert not any(attention_options(name)["identity_start"] for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_identity(name):
    module = module_of(name, identity_start=True)
    variables = fresh(module, X)
    apply = lambda train: module.apply(variables, X, train, mutable=["batch_stats"])[0]
    for y in jax.jit(lambda: (apply(False), apply(True)))():
        np.testing.assert_array_equal(y, X)


@pytest.mark.medium
@pytest.mark.parametrize("train", [False, True])
def test_a_network_starts_as_the_one_without_attention(train):
    plain, ours = network("none"), network("hga", **SMALL, identity_start=True)
    weights = fresh(plain, IMAGES)
    variables = unflatten_dict(flatten_dict(fresh(ours, IMAGES)) | flatten_dict(weights))
    assert any("attention" in path for path in flatten_dict(variables))
    apply = lambda model: jax.jit(lambda v: model.apply(v, IMAGES, train=train, mutable=["batch_stats"])[0])
    np.testing.assert_allclose(apply(ours)(variables), apply(plain)(weights), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_everything_of_the_attention_learns(name):
    module = module_of(name, identity_start=True)
    variables, target = fresh(module, X), jnp.asarray(sample((64,)), jnp.float32)
    optimizer = optax.sgd(1.0, momentum=0.9)

    @jax.jit
    def step(params, state):
        def loss(params):
            y, _ = module.apply(variables | {"params": params}, X, train=True, mutable=["batch_stats"])
            return ((y - X * target) ** 2).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], optimizer.init(variables["params"])
    for _ in range(3):
        params, state = step(params, state)
    before, after = flatten_dict(variables["params"]), flatten_dict(params)
    # A shift of all of a softmax's inputs, or of all that a norm reads, changes nothing.
    idle = {("gc", "attend", "bias"), ("nl", "key", "bias"), ("nl", "restore", "bias"), ("nl", "value", "bias")}
    idle |= {("hga_table2", norm, "bias") for norm in ("norm_1", "norm_3")}
    still = {path for path in before if np.abs(after[path] - before[path]).max() < 1e-7}
    assert not {path for path in still if (name, *path[-2:]) not in idle}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nl"])
def test_a_share_of_one_is_the_attention_itself(name):
    bare, started = module_of(name), module_of(name, identity_start=True)
    variables, full = fresh(bare, X), fresh(started, X)
    assert set(flatten_dict(full["params"])) - set(flatten_dict(variables["params"])) == {(SHARE,)}
    one = variables | {"params": variables["params"] | {SHARE: jnp.ones(64)}}
    np.testing.assert_allclose(started.apply(one, X), bare.apply(variables, X), atol=1e-6)


@pytest.mark.medium
@pytest.mark.parametrize("options", [{}, {"restore": "features"}])
def test_the_short_cut_through_the_source_is_the_same(options, monkeypatch):
    """Value and gradients of a training pass, with what the block knows of the map and without."""
    model = network("hga", **SMALL, identity_start=True, **options)
    variables = fresh(model, IMAGES)
    raised = {k: jnp.full_like(v, 0.3) if k[-1] == SHARE else v for k, v in flatten_dict(variables["params"]).items()}

    def loss(params):
        logits, _ = model.apply(variables | {"params": params}, IMAGES, train=True, mutable=["batch_stats"])
        return (logits**2).sum()

    short = jax.jit(jax.value_and_grad(loss))(unflatten_dict(raised))
    monkeypatch.setattr(HGA, "uses_source", False)
    long = jax.jit(jax.value_and_grad(lambda params: loss(params)))(unflatten_dict(raised))
    for ours, expected in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=1e-3 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", NAMES)
def test_keeps_shape_and_dtype(name):
    module = create_attention(name, 64, dtype=jnp.bfloat16, identity_start=True)
    y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), X.astype(jnp.bfloat16))
    assert (y.shape, y.dtype) == (X.shape, jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["params"]))


def test_what_is_no_switch_is_refused():
    with pytest.raises(ValueError, match="attention 'se': option identity_start=1 must be of type bool"):
        create_attention("se", 64, identity_start=1)
    with pytest.raises(ValueError, match="attention 'sk' has no option 'identity_start'"):
        create_attention("sk", 64, identity_start=True)
