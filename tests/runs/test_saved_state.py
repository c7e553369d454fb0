"""What an optimizer's state may become and still go on, with checkpoints of today and of before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.errors import UserError
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.saved_state import named_arrays
from hga_flax.training.optimizer import create_optimizer, decays
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
    for step, state in enumerate(saved, 1):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(step, state, {}, None)
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
