import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.errors import ConfigError
from hga_flax.training.optimizer import create_optimizer, create_schedule, warmup_steps
from tests.training import tiny


def rates(steps, cut=0, **schedule):
    options = {f"schedule__{k}": v for k, v in schedule.items()}
    c = tiny.config(optimizer__learning_rate=0.6, training__steps=cut, **options)
    function = create_schedule(c, steps_per_epoch=10.0, total_steps=1000)
    return [float(function(jnp.asarray(s))) for s in steps]


def test_the_papers_schedule():
    ours = rates([0, 299, 300, 599, 600, 900, 999], name="step", decay_every_epochs=30.0)
    np.testing.assert_allclose(ours, [0.6, 0.6, 0.06, 0.06, 0.006, 0.0006, 0.0006], rtol=1e-5)


def test_the_cifar_schedule_of_identity_mappings():
    options = {"name": "step", "decay_at_steps": (320, 480), "warmup_steps": 40, "warmup_shape": "constant"}
    ours = rates([0, 39, 40, 319, 320, 480], warmup_learning_rate=0.01, **options)
    np.testing.assert_allclose(ours, [0.01, 0.01, 0.6, 0.6, 0.06, 0.006], rtol=1e-5)


def test_warm_up_is_linear_and_counts_from_the_start_of_training():
    ours = rates([0, 25, 50, 299, 300], name="step", warmup_epochs=5.0, warmup_learning_rate=0.1)
    np.testing.assert_allclose(ours, [0.1, 0.35, 0.6, 0.6, 0.06], rtol=1e-5)


def test_cosine_may_end_above_zero():
    ours = rates([0, 500, 1000], name="cosine", end_learning_rate=0.1)
    np.testing.assert_allclose(ours, [0.6, 0.35, 0.1], rtol=1e-5)


def test_cosine_ends_at_zero():
    ours = rates([0, 100, 550, 1000], name="cosine", warmup_steps=100)
    np.testing.assert_allclose(ours, [0.0, 0.6, 0.3, 0.0], atol=1e-6)


def test_linear_rises_in_its_share_of_the_training_and_falls_to_its_end():
    ours = rates([0, 50, 100, 550, 1000], name="linear", warmup_share=0.1, end_learning_rate=0.2)
    np.testing.assert_allclose(ours, [0.0, 0.3, 0.6, 0.4, 0.2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("total", "first"), [(1000, 250), (40, 10), (3, 1), (1, 0)])
def test_a_warm_up_given_as_a_share_follows_the_length_of_the_training(total, first):
    c = tiny.config(optimizer__learning_rate=0.6, schedule__name="cosine", schedule__warmup_share=0.25)
    with c.unlocked():
        c.training.steps = 0
    rate = create_schedule(c, steps_per_epoch=10.0, total_steps=total)
    np.testing.assert_allclose([float(rate(first)), float(rate(total))], [0.6, 0.0], atol=1e-6)
    assert first == 0 or float(rate(first - 1)) < 0.6


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        *[({"share": 0.29}, 100, 29), ({"share": 0.57}, 100, 57)],
        *[({"epochs": 0.04}, 100, 1), ({"epochs": 0.26}, 100, 3)],
        *[({"share": 0.5}, 1, 0), ({"epochs": 0.04}, 1, 0)],  # there is no step to warm up for
    ],
)
def test_a_warm_up_is_rounded_but_never_to_nothing(warmup, total, steps):
    ((length, value),) = warmup.items()
    assert warmup_steps(tiny.config(**{f"schedule__warmup_{length}": value}), 10.0, total) == steps


def test_constant_and_decay_factor():
    assert rates([0, 999], name="constant") == pytest.approx([0.6, 0.6])
    assert rates([300], name="step", decay_factor=0.5) == pytest.approx([0.3])


def test_a_warm_up_as_long_as_the_training_is_refused():
    with pytest.raises(ConfigError, match="a warm-up of 1000 steps does not fit in 1000 steps of training"):
        rates([0], name="step", warmup_epochs=100.0)


def test_a_run_cut_short_may_end_within_its_warm_up():
    assert rates([0, 500], cut=1000, name="step", warmup_epochs=100.0) == pytest.approx([0.0, 0.3])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_sgd_against_plain_arithmetic(nesterov, decay_norm_and_bias):
    c = tiny.config(
        optimizer__nesterov=nesterov, optimizer__weight_decay=0.1, optimizer__decay_norm_and_bias=decay_norm_and_bias
    )
    optimizer = create_optimizer(c, optax.constant_schedule(0.5))
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.full(2, 3.0)}
    grads = [
        {"kernel": jnp.full((2, 2), 0.3), "scale": jnp.full(2, 0.2)},
        {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)},
    ]
    state, velocity = optimizer.init(params), {"kernel": 0.0, "scale": 0.0}
    expected = {"kernel": 1.0, "scale": 3.0}
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        for name in expected:
            decay = 0.1 if name == "kernel" or decay_norm_and_bias else 0.0
            total = float(g[name].ravel()[0]) + decay * expected[name]
            velocity[name] = 0.9 * velocity[name] + total
            expected[name] -= 0.5 * (total + 0.9 * velocity[name] if nesterov else velocity[name])
    for name in expected:
        np.testing.assert_allclose(params[name], np.full_like(params[name], expected[name]), rtol=1e-5)


def test_without_momentum():
    c = tiny.config(optimizer__momentum=0.0, optimizer__weight_decay=0.0)
    optimizer = create_optimizer(c, optax.constant_schedule(0.5))
    params = {"w": jnp.ones(())}
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
    assert float(updates["w"]) == -0.5


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_adamw_and_lamb_against_the_papers_arithmetic(name, decay_norm_and_bias):
    """In float64, with NumPy alone: AdamW's algorithm 2, LAMB's algorithm 2 with bias correction."""
    b1, b2, eps, rate, decay = 0.8, 0.95, 1e-3, 0.05, 0.1
    c = tiny.config(
        optimizer__name=name,
        optimizer__b1=b1,
        optimizer__b2=b2,
        optimizer__eps=eps,
        optimizer__weight_decay=decay,
        optimizer__decay_norm_and_bias=decay_norm_and_bias,
    )
    random = np.random.default_rng(0)
    expected = {"kernel": random.normal(size=(3, 2)), "scale": random.normal(size=4), "zero": np.zeros((2, 2))}
    params = {key: jnp.asarray(value, jnp.float32) for key, value in expected.items()}
    optimizer = create_optimizer(c, optax.constant_schedule(rate))
    state = optimizer.init(params)
    mean = {key: 0.0 for key in expected}
    square = {key: 0.0 for key in expected}
    for t in range(1, 6):
        grads = {key: random.normal(size=value.shape) for key, value in expected.items()}
        updates, state = optimizer.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for key, g in grads.items():
            mean[key] = b1 * mean[key] + (1 - b1) * g
            square[key] = b2 * square[key] + (1 - b2) * g**2
            step = mean[key] / (1 - b1**t) / (np.sqrt(square[key] / (1 - b2**t)) + eps)
            decays = decay_norm_and_bias or expected[key].ndim > 1
            step = step + decay * expected[key] if decays else step
            norm = np.linalg.norm(expected[key])
            if name == "lamb" and decays and norm > 0:
                step = step * norm / np.linalg.norm(step)
            expected[key] = expected[key] - rate * step
    for key in expected:
        np.testing.assert_allclose(params[key], expected[key], rtol=2e-5, atol=1e-6)
    assert (expected["zero"] != 0).all()  # an array of norm zero still moves
