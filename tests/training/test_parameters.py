import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from hga_flax.errors import ConfigError
from hga_flax.processes.mesh import to_devices
from hga_flax.training import parameters as p
from hga_flax.training.optimizer import create_optimizer
from tests.training import tiny

PARAMS = {
    "stem_conv": {"kernel": jnp.ones((2, 3))},
    "stem_norm": {"scale": jnp.full(4, 2.0)},
    "stage1_block1": {"attention": {"ee": {"excite": jnp.ones(5)}}, "conv1": {"kernel": jnp.ones((2, 2))}},
    "classifier": {"kernel": jnp.ones((2, 5)), "bias": jnp.zeros(5)},
}


def updated(steps=3, **overrides):
    """PARAMS after steps with gradients of one, and the last state of the optimizer."""
    overrides = {"optimizer__weight_decay": 0.1} | overrides
    optimizer = create_optimizer(tiny.config(**overrides), optax.constant_schedule(0.5))
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return flatten_dict(params, sep="/"), state


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("stem*", "stem_norm/scale", True),
        ("stem_norm", "stem_norm/scale", True),
        ("stem", "stem_norm/scale", False),
        ("stage[12]*", "stage2_block1/conv1/kernel", True),
        ("stage[12]*", "stage3_block1/conv1/kernel", False),
        ("*/attention", "stage1_block1/attention/ee/excite", True),
        ("attention", "stage1_block1/attention/ee/excite", False),
        ("*/bias", "classifier/bias", True),
        ("*", "classifier/bias", True),
        ("params/stem*", "stem_norm/scale", True),
        ("params/stem", "stem_norm/scale", False),
    ],
)
def test_patterns(pattern, name, fits):
    assert p.matches(pattern, name) == fits


@pytest.mark.parametrize(("name", "moments"), [("sgd", 1), ("adamw", 2), ("lamb", 2)])
def test_frozen_parameters_stay_and_gather_no_momentum(name, moments):
    before = flatten_dict(PARAMS, sep="/")
    free, free_state = updated(optimizer__name=name)
    held, state = updated(optimizer__name=name, optimizer__freeze=("stem*", "*/attention"))
    frozen = {"stem_conv/kernel", "stem_norm/scale", "stage1_block1/attention/ee/excite"}
    for name in before:
        np.testing.assert_array_equal(held[name], before[name] if name in frozen else free[name])
    assert jax.tree.structure(free_state) == jax.tree.structure(state)  # so that a run may freeze others as it goes on
    still = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and not np.any(leaf)]
    assert sum(leaf.size for leaf in still) == moments * (6 + 4 + 5)


def test_factors_are_other_learning_rates():
    """A tenth of the rate everywhere and ten times as much for the head is the same as the head's own factor."""
    factored, _ = updated(optimizer__learning_rate_factors=("stem_norm=0.5", "stem*=0.1", "*/bias=3"))
    base, _ = updated()
    for factor, names in ((0.5, ["stem_norm/scale"]), (0.1, ["stem_conv/kernel"]), (3.0, ["classifier/bias"])):
        optimizer = create_optimizer(tiny.config(optimizer__weight_decay=0.1), optax.constant_schedule(0.5 * factor))
        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(3):
            updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
            params = optax.apply_updates(params, updates)
        for name in names:
            np.testing.assert_allclose(factored[name], flatten_dict(params, sep="/")[name], rtol=1e-6)
    np.testing.assert_array_equal(factored["classifier/kernel"], base["classifier/kernel"])


def test_the_state_is_the_usual_one_without_patterns():
    _, state = updated()
    assert isinstance(state, tuple) and len(state) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"freeze": ("stemm*",)}, r"^optimizer\.freeze: no parameter's path matches 'stemm\*'; the nearest: stem_"),
        ({"freeze": ("params/stemm*",)}, r"matches 'params/stemm\*'; the nearest: stem_"),
        ({"freeze": ("stage[45]*",)}, r"matches 'stage\[45\]\*'; the nearest: stage1_block1"),
        ({"freeze": ("",)}, r"matches ''; the nearest: classifier, stage1_block1, stem_conv, stem_norm$"),
        (
            {"learning_rate_factors": ("head=10",)},
            r"^optimizer\.learning_rate_factors: no parameter's path matches 'head'",
        ),
        ({"freeze": ("st*", "classifier")}, r"^optimizer\.freeze=\('st\*', 'classifier'\): leaves nothing to train"),
    ],
)
def test_a_pattern_that_fits_nothing_names_the_nearest(overrides, message):
    with pytest.raises(ConfigError, match=message):
        p.check_patterns(tiny.config(**{f"optimizer__{k}": v for k, v in overrides.items()}), PARAMS)


def test_what_a_run_prints():
    c = tiny.config(optimizer__freeze=("stem*",), optimizer__learning_rate_factors=("classifier=10", "*=0.5"))
    assert dict(p.describe_groups(c, PARAMS)) == {
        "frozen": "10 of 34 parameters, 2 of 6 arrays: stem*",
        "rates": "classifier x 10 (15 parameters), * x 0.5 (9 parameters)",
    }
    assert p.describe_groups(tiny.config(), PARAMS) == []


@pytest.mark.medium
def test_the_step_leaves_frozen_parameters_bit_for_bit_and_reports_the_others_gradient():
    c = tiny.config(optimizer__freeze=("stem*", "stage1*", "*/attention"), model__attention="se")
    mesh = tiny.mesh(2)
    _, state, step = tiny.build(c, mesh)
    before = flatten_dict(jax.device_get(state.params), sep="/")
    (batch,) = to_devices(iter([tiny.batch()]), mesh)
    for _ in range(2):
        state, report = step(state, batch)
    for name, array in flatten_dict(jax.device_get(state.params), sep="/").items():
        held = name.startswith(("stem", "stage1")) or "attention" in name
        assert np.array_equal(array, before[name]) == held, name
    assert float(report.gradient_norm) > 0
