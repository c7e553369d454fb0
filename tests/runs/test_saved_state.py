"""What a saved state may be read as: by another optimizer, model or version, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.errors import UserError
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.saved_state import named_arrays
from hga_flax.training.optimizer import create_optimizer, decays
from tests.runs.test_checkpoints import abstract as abstract_run
from tests.runs.test_checkpoints import small, state
from tests.training import tiny

RATE = optax.constant_schedule(0.1)
PARAMS = {"stem": {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(4)}, "head": {"bias": jnp.ones(5)}}


def after(optimizer):
    """A state two steps on."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in (1, 2):
        updates, state = optimizer.update(
            jax.tree.map(lambda p, step=step: step * jnp.ones_like(p), params), state, params
        )
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": state}


def abstract(optimizer):
    return jax.eval_shape(lambda: {"params": PARAMS, "opt_state": optimizer.init(PARAMS)})


def restored(tmp_path, saved, like):
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        like,
    )
    for step, given in enumerate(saved, 1):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(step, given, {}, None)
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, read_only=True)
    try:
        return checkpoints.restore_latest(like)[1]
    finally:
        checkpoints.close()


CHANGES = (
    {"decay_norm_and_bias": False},
    {"decay_norm_and_bias": True},
    {"weight_decay": 0.0},
    {"weight_decay": 0.1, "decay_norm_and_bias": False},
    {"clip_norm": 1.0},
    {"momentum": 0.0, "nesterov": False},
    {"momentum": 0.5, "nesterov": True},
    {"freeze": ("stem",)},
    {"learning_rate_factors": ("stem=0.1", "*=3")},
    {"freeze": ("head",), "learning_rate_factors": ("stem=0.1",)},
    {"learning_rate": 0.7, "b1": 0.5, "b2": 0.7, "eps": 1e-3},
)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_the_state_is_the_same_whatever_the_other_keys_are(name):
    make = lambda **more: create_optimizer(tiny.config(optimizer__name=name, **more), RATE).init(PARAMS)
    plain = make()
    for changes in CHANGES:
        state = make(**{f"optimizer__{key}": value for key, value in changes.items()})
        assert jax.tree.structure(state) == jax.tree.structure(plain), changes


# How states were nested before they had one shape: (transformation, the same today).
SGD = lambda momentum, mask=None: optax.chain(
    optax.identity(), optax.add_decayed_weights(1e-4, mask), optax.sgd(RATE, momentum)
)
ADAM = optax.chain(
    optax.identity(), optax.scale_by_adam(), optax.add_decayed_weights(1e-4, decays), optax.scale_by_learning_rate(RATE)
)
LAMB = optax.chain(
    optax.identity(),
    optax.scale_by_adam(),
    optax.identity(),
    optax.masked(optax.scale_by_trust_ratio(), decays),
    optax.scale_by_learning_rate(RATE),
)
LABELS = lambda params: {"stem": {"kernel": "frozen", "scale": "frozen"}, "head": {"bias": "trained"}}
FROZEN = lambda inner: optax.partition({"trained": inner, "frozen": optax.set_to_zero()}, LABELS)
FACTORS = lambda inner: optax.chain(inner, optax.stateless(lambda updates, params: updates))
BEFORE = {
    "masked decay": (SGD(0.9, decays), "sgd"),
    "whole decay": (SGD(0.9), "sgd"),
    "no momentum": (SGD(None), "sgd"),
    "factors": (FACTORS(SGD(0.9)), "sgd"),
    "frozen": (FROZEN(SGD(0.9, decays)), "sgd"),
    "frozen with factors": (FROZEN(FACTORS(SGD(0.9))), "sgd"),
    "adamw": (ADAM, "adamw"),
    "adamw frozen": (FROZEN(FACTORS(ADAM)), "adamw"),
    "lamb": (LAMB, "lamb"),
}


@pytest.mark.parametrize("kind", BEFORE)
def test_checkpoints_of_before_are_read(tmp_path, kind):
    optimizer, name = BEFORE[kind]
    today = create_optimizer(tiny.config(optimizer__name=name), RATE)
    saved = after(optimizer)
    found = restored(tmp_path, [saved], abstract(today))
    assert jax.tree.structure(found["opt_state"]) == jax.tree.structure(today.init(PARAMS))
    before, now = named_arrays(saved), named_arrays(found)
    assert before.keys() <= now.keys()
    for array, value in now.items():
        np.testing.assert_array_equal(value, before[array] if array in before else np.zeros_like(value))
    assert any(np.any(value) for array, value in now.items() if array.startswith("opt_state"))
    today.update(PARAMS, found["opt_state"], found["params"])  # and goes on


def test_another_optimizer_is_not_begun_at_zero(tmp_path):
    for number, (saved, name) in enumerate(((SGD(None), "adamw"), (SGD(0.9), "adamw"), (ADAM, "sgd"))):
        with pytest.raises(UserError, match="belongs to another optimizer: opt_state/"):
            like = abstract(create_optimizer(tiny.config(optimizer__name=name), RATE))
            restored(tmp_path / str(number), [after(saved)], like)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"a": jnp.zeros(3000, jnp.bfloat16), "b": jnp.zeros(4)},
            r"params/a is \(3000,\) float32 there and \(3000,\) bfl",
        ),
        (
            {"a": jnp.zeros(3001), "b": jnp.zeros(4)},
            r"another model: params/a is \(3000,\) float32 there and \(3001,\)",
        ),
        ({"a": jnp.zeros(3000)}, r"params/b is \(4,\) float32 there and absent here"),
    ],
)
def test_arrays_of_another_kind_are_refused_and_stay_where_they_are(tmp_path, other, message):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {}, None)
    with pytest.raises(UserError, match=message):
        checkpoints.restore_latest({"params": other, "opt_state": jnp.zeros(7)})
    with pytest.raises(UserError, match="another optimizer: opt_state is"):
        checkpoints.restore_latest(small(0) | {"opt_state": jnp.zeros(8)})
    checkpoints.close()
    assert checkpoints.steps() == [1] and not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    "other",
    [{"model__attention": "none"}, {"model__options": "features=8"}, {"model__name": "cifar_resnet14"}],
)
def test_another_models_checkpoint_is_refused(tmp_path, other):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {}, None)
    checkpoints.wait()
    with pytest.raises(UserError, match="belongs to another model: ") as caught:
        checkpoints.restore_latest(abstract_run(**other))
    assert "\n" not in str(caught.value)
    checkpoints.close()


def test_a_checkpoint_without_the_average_is_refused_where_there_should_be_one(tmp_path):
    """And one that was written before there were averages is one without: the tree is the same."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {}, None)
    checkpoints.wait()
    names = {str(path[0]) for path, _ in jax.tree.leaves_with_path(state())}
    assert names == {f".{name}" for name in ("step", "params", "batch_stats", "opt_state", "metrics", "skipped")}
    with pytest.raises(UserError, match=r"belongs to another training\.ema_decay: ema/.* is absent there"):
        checkpoints.restore_latest(abstract_run(training__ema_decay=0.9))
    checkpoints.close()


def test_the_keys_that_made_another_state_are_named(tmp_path):
    def restore(changes, **overrides):
        checkpoints = Checkpoints(tmp_path, read_only=True, changes=["training.steps: 6 -> 8", *changes])
        with pytest.raises(UserError) as caught:
            checkpoints.restore_latest(abstract_run(**overrides))
        checkpoints.close()
        return str(caught.value)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(), {}, None)
    checkpoints.close()
    for key, old, new in (("optimizer.name", "sgd", "adamw"), ("training.ema_decay", 0.0, 0.9)):
        change = f"{key}: {old} -> {new}"
        told = restore([change], **{key.replace(".", "__"): new})
        assert f"changed since: {change}; undo that" in told and "training.steps" not in told
    assert "belongs to another model: " in restore([change], model__attention="none")
