import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.config.loading import build_model
from hga_flax.processes.mesh import to_devices
from hga_flax.training.divergence import Diverged, StepReports, command_line, explain, nonfinite
from hga_flax.training.optimizer import create_optimizer
from hga_flax.training.step import StepReport
from hga_flax.training.trainer import train
from tests.training import tiny

NAN, INF = float("nan"), float("inf")


def reports(losses, limit=0, skipped=0):
    said = []
    ours = StepReports(limit, skipped, said.append)
    for step, (loss, norm) in enumerate(losses, 1):
        ours.add(step, StepReport(jnp.float32(loss), jnp.float32(norm)))
    return ours, said


def test_the_newest_steps_are_left_alone():
    ours, said = reports([(3.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
    assert ours.read() == (1, 3.0) and ours.read() is None
    assert ours.read(in_flight=0) == (3, 1.0) and said == []


@pytest.mark.parametrize(
    ("report", "what"),
    [
        ((NAN, 1.0), "the loss of step 2 is nan"),
        ((INF, 1.0), "the loss of step 2 is inf"),
        ((1.0, NAN), "the gradient norm of step 2 is nan"),
        ((1.0, INF), "the gradient norm of step 2 is inf"),
    ],
)
def test_what_is_not_finite_ends_the_run_at_its_step(report, what):
    assert nonfinite(2, *report) == what
    with pytest.raises(Diverged, match=what):
        reports([(1.0, 1.0), report, (1.0, 1.0)])[0].read(in_flight=0)


def test_skipped_steps_are_counted_over_sessions():
    bad = [(NAN, 1.0), (1.0, 1.0), (1.0, INF), (1.0, 1.0)]
    ours, said = reports(bad, limit=2)
    assert ours.read(in_flight=0) == (4, 1.0)
    assert len(said) == 2 and "the loss of step 1 is nan; the step is skipped (1 of at most 2)" in said[0]
    with pytest.raises(Diverged, match=r"norm of step 3 is inf \(the limit training\.skip_nonfinite=2 is reached\)"):
        reports(bad, limit=2, skipped=1)[0].read(in_flight=0)


def test_the_error_says_what_is_kept_and_how_to_look(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=a b.py"])
    assert command_line() == "python train.py '--config=a b.py'"
    text = str(explain("the loss of step 9 is nan", [3, 6]))
    assert "diverged: the loss of step 9 is nan; the checkpoint of step 6 is kept" in text
    assert text.endswith("from step 6: JAX_DEBUG_NANS=1 python train.py '--config=a b.py'")
    assert "no checkpoint had been written" in str(explain("x", [])) and "from step 0" in str(explain("x", []))


def naive_steps(c, batches, clip, skips):
    """The same training as a loop over plain arrays: (params, batch_stats, momentum, average, norms, skipped)."""
    model = build_model(c, 10)
    _, state, _ = tiny.build(c, tiny.mesh())
    params, stats = state.params, state.batch_stats
    velocity = jax.tree.map(jnp.zeros_like, params)
    average, norms, skipped = (params, stats), [], 0

    @jax.jit
    def gradient(params, stats, images, labels):
        def loss_fn(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

        return jax.grad(loss_fn, has_aux=True)(params)

    for batch in batches:
        images = jnp.asarray((batch["image"] / 255.0 - 0.5) / 0.25, jnp.float32)
        grads, new_stats = gradient(params, stats, images, batch["label"])
        flat = np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])
        norm = np.sqrt((flat**2).sum())
        if skips and not np.isfinite(norm):
            skipped += 1
            continue
        keep = min(c.training.ema_decay, (1 + len(norms)) / (10 + len(norms)))
        norms.append(norm)
        scale = min(1.0, clip / norm) if clip else 1.0
        velocity = jax.tree.map(lambda v, g, w, s=scale: 0.9 * v + (s * g + 1e-4 * w), velocity, grads, params)
        params = jax.tree.map(lambda w, v: w - 0.05 * v, params, velocity)
        stats = new_stats
        average = jax.tree.map(lambda a, w, d=keep: d * a + (1 - d) * w, average, (params, stats))
    return params, stats, velocity, average, norms, skipped


def close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.medium
@pytest.mark.parametrize("clip", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_skipped_steps_and_clipping_against_a_naive_loop(clip):
    """The second of four batches holds an image of NaNs; without it the same three steps are made."""
    c = tiny.config(
        data__augmentation="none",
        data__crop_padding=0,
        training__skip_nonfinite=3,
        training__ema_decay=0.9,
        optimizer__clip_norm=clip,
    )
    batches = [
        tiny.batch(seed=seed) | {"image": tiny.batch(seed=seed)["image"].astype(np.float32)} for seed in range(4)
    ]
    batches[1]["image"][3] = np.nan
    params, stats, velocity, average, norms, skipped = naive_steps(c, batches, clip, skips=True)
    _, state, step = tiny.build(c, tiny.mesh(2))
    reports = []
    for placed in to_devices(iter(batches), tiny.mesh(2)):
        state, report = step(state, placed)
        reports.append(report)
    close(state.params, params)
    close(state.batch_stats, stats)
    close(state.opt_state[2][0].trace, velocity)
    close((state.ema["params"], state.ema["batch_stats"]), average)
    assert (int(state.skipped), int(state.step)) == (skipped, 4) == (1, 4)
    assert int(state.metrics.loss.count) == 3 * 16  # the window's mean is that of the steps that were made
    assert np.isfinite([float(state.metrics.compute()[n]) for n in ("loss", "gradient_norm")]).all()
    finite = [r for r in reports if np.isfinite(float(r.loss))]
    np.testing.assert_allclose([float(r.gradient_norm) for r in finite], norms, rtol=1e-3)
    assert not np.isfinite(float(reports[1].loss)) and (clip == 0 or max(norms) > clip)


def test_clipping_is_of_the_whole_gradient_and_before_weight_decay():
    c = tiny.config(optimizer__clip_norm=5.0, optimizer__weight_decay=0.5, optimizer__momentum=0.0)
    optimizer = create_optimizer(c, optax.constant_schedule(1.0))
    params = {"a": jnp.full(1, 2.0), "b": jnp.full(1, 4.0)}
    grads = {"a": jnp.full(1, 6.0), "b": jnp.full(1, 8.0)}  # of norm 10
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-(3 + 1), -(4 + 2)], rtol=1e-6)


@pytest.mark.medium
@pytest.mark.parametrize("option", ["jax_debug_nans", "jax_debug_infs"])
def test_a_sound_run_trains_under_jax_s_search_for_nans(tmp_path, option):
    jax.config.update(option, True)
    try:
        train(tiny.config(model__attention="none", training__steps=2), str(tmp_path))
    finally:
        jax.config.update(option, False)
    (line, *_) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2 and "train/loss" in line
