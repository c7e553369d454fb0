import re
import threading
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from hga_flax.attention import registry
from hga_flax.bench.compiled_step import training_step
from hga_flax.processes.mesh import replicate, replicated, to_devices
from hga_flax.training import step as step_module
from hga_flax.training.evaluation import normalized
from hga_flax.training.metrics import ClassificationMetrics, read
from hga_flax.training.step import accumulated_gradient, compile_step, make_eval_step, prepare_images
from tests.reference import perturbed
from tests.training import tiny

RESNEXT = {
    "model__name": "resnext50_32x4d",
    "model__options": "stage_sizes=(1, 1), features=16",
    "model__attention_options": "reduced_channels=8",
}


PLAIN = tiny.ONE_BLOCK | {"data__augmentation": "none", "data__crop_padding": 0}


def one_step(c, devices, batch, image_shape=(8, 8, 1)):
    """Returns (HLO text, state before, state after, loss) of one step on so many devices."""
    on = tiny.mesh(devices)
    _, state, step = tiny.build(c, on, image_shape)
    placed = next(to_devices(iter([batch]), on))
    compiled = step.lower(state, placed).compile()
    before = jax.tree.map(np.asarray, state)
    after, report = compiled(state, placed)
    return compiled.as_text(), before, jax.tree.map(np.asarray, after), float(report.loss)


def worst(a, b):
    errors = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-6), a, b)
    return max(jax.tree.leaves(errors))


@pytest.mark.medium
def test_a_resnext_with_hga_steps_the_same_on_8_devices_and_gathers_nothing():
    """In float32 rounding may flip a ReLU that stands near zero; in float64 nothing hides behind that."""
    with jax.enable_x64(True):
        c = tiny.config(**RESNEXT, model__dtype="float64", data__image_size=32)
        batch = tiny.batch(16, 32, 3)
        _, before, one, loss_one = one_step(c, 1, batch, (32, 32, 3))
        text, _, eight, loss_eight = one_step(c, 8, batch, (32, 32, 3))
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text
    assert loss_eight == pytest.approx(loss_one, rel=1e-6)
    assert worst(one.batch_stats, eight.batch_stats) < 1e-6  # parameters and statistics themselves are float32
    assert worst(one.params, eight.params) < 1e-6
    # Relative to the step, which is much smaller than the parameters.
    change = lambda after: jax.tree.map(np.subtract, after.params, before.params)
    assert worst(change(one), change(eight)) < 1e-4


@pytest.mark.medium
@pytest.mark.parametrize("mixed", [{}, {"data__mixup": 0.2}])
def test_a_batch_in_parts_has_the_same_parts_on_any_number_of_devices(mixed):
    """Each part is normalised by statistics of its own."""
    c = tiny.config(**tiny.ONE_BLOCK, **mixed, training__accumulation_steps=2)
    one, two = (one_step(c, devices, tiny.batch()) for devices in (1, 4))
    assert one[3] == pytest.approx(two[3], rel=1e-5)
    assert worst(one[2].batch_stats, two[2].batch_stats) < 1e-5 and worst(one[2].params, two[2].params) < 1e-5
    sums = [
        (float(m.loss.total), float(m.top1_error.total), float(m.loss.count)) for m in (one[2].metrics, two[2].metrics)
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)  # logits and losses are those of their labels


@pytest.mark.medium
def test_where_each_device_has_its_own_statistics_the_step_depends_on_how_many_there_are():
    c = tiny.config(**tiny.ONE_BLOCK, training__batch_norm_scope="device")
    after = [one_step(c, devices, tiny.batch())[2] for devices in (1, 8)]
    assert worst(after[0].params, after[1].params) > 1e-3
    assert worst(after[0].batch_stats, after[1].batch_stats) > 1e-3


def test_a_step_is_sgd_on_the_mean_loss():
    """Against a step written without shard_map, clu or optax."""
    c = tiny.config(optimizer__weight_decay=0.01, **PLAIN)
    batch = tiny.batch()
    _, before, after, loss = one_step(c, 4, batch)
    model, _, _ = tiny.build(tiny.config(training__batch_norm_scope="device", **PLAIN), tiny.mesh())
    images = (batch["image"] / 255.0 - 0.5) / 0.25

    def loss_fn(params):
        variables = {"params": params, "batch_stats": before.batch_stats}
        logits, _ = model.apply(variables, jnp.asarray(images, jnp.float32), train=True, mutable=["batch_stats"])
        p = jnp.exp(logits) / jnp.exp(logits).sum(axis=-1, keepdims=True)
        return -jnp.log(p[jnp.arange(16), batch["label"]]).mean()

    expected_loss, grads = jax.jit(jax.value_and_grad(loss_fn))(before.params)
    expected = jax.tree.map(lambda w, g: w - 0.05 * (g + 0.01 * w), before.params, grads)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    assert worst(expected, after.params) < 1e-5
    assert after.step == 1


@pytest.mark.medium
def test_augmentation_in_the_step_does_not_depend_on_the_devices():
    c = tiny.config(data__rotation_degrees=20.0, **tiny.ONE_BLOCK)
    plain = tiny.config(**PLAIN)
    losses = [one_step(c, devices, tiny.batch())[3] for devices in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0] - one_step(plain, 1, tiny.batch())[3]) > 1e-4


MIXED = {"data__mixup": 0.4, "data__cutmix": 1.0, "data__random_erasing": 0.5, "training__label_smoothing": 0.1}


@pytest.mark.medium
def test_mixing_and_erasing_do_not_depend_on_the_devices():
    c = tiny.config(**MIXED, **tiny.ONE_BLOCK)
    losses = [one_step(c, devices, tiny.batch())[3] for devices in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_alternating_flip_shows_each_image_both_ways_in_two_epochs():
    c = tiny.config(data__alternating_flip=True, data__crop_padding=0, data__rotation_degrees=0.0)
    batch = {name: jnp.asarray(value) for name, value in tiny.batch().items()}
    seen = [
        np.asarray(prepare_images(batch | {"epoch": jnp.full(16, epoch, jnp.int32)}, c, jax.random.key(0))[0])
        for epoch in range(3)
    ]
    np.testing.assert_array_equal(seen[1], seen[0][:, :, ::-1])
    np.testing.assert_array_equal(seen[2], seen[0])
    plain = np.asarray(normalized(batch["image"], c.data))
    mirrored = (seen[0] != plain).any(axis=(1, 2, 3))
    assert 0 < mirrored.sum() < 16


@pytest.mark.slow
def test_the_loss_of_mixed_images_is_that_of_soft_labels():
    c = tiny.config(**MIXED)
    batch = tiny.batch()
    _, before, _, loss = one_step(c, 1, batch)
    images, other, share = prepare_images({k: jnp.asarray(v) for k, v in batch.items()}, c, jax.random.key(c.seed))
    own, others = np.eye(10)[batch["label"]], np.eye(10)[np.asarray(other)]
    target = np.asarray(share)[:, None] * own + (1 - np.asarray(share)[:, None]) * others
    target = 0.9 * target + 0.1 / 10
    model, _, _ = tiny.build(tiny.config(training__batch_norm_scope="device"), tiny.mesh())
    variables = {"params": before.params, "batch_stats": before.batch_stats}
    apply = jax.jit(lambda images: model.apply(variables, images, train=True, mutable=["batch_stats"])[0])
    logits = apply(images)
    assert loss == pytest.approx(float(optax.softmax_cross_entropy(logits, target).mean()), rel=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"training__label_smoothing": 0.1},
        {"training__loss": "binary_cross_entropy"},
        {"model__dtype": "bfloat16"},
        {"model__options": "stage_sizes=(1,), features=8, stochastic_depth=0.5"},
    ],
)
def test_options_of_the_step_change_it(change):
    base, changed = tiny.config(**tiny.ONE_BLOCK), tiny.config(**(tiny.ONE_BLOCK | change))
    assert one_step(base, 1, tiny.batch())[3] != one_step(changed, 1, tiny.batch())[3]


def accumulation(devices, parts, **options):
    c = tiny.config(training__accumulation_steps=parts, training__batch_size=128, **(PLAIN | options))
    return one_step(c, devices, tiny.batch(128))


def reduces(text):
    return re.findall(r" all-reduce(?:-start)?\(", text)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("devices", "mixed", "loop"), [(1, {}, False), pytest.param(2, MIXED, True, marks=pytest.mark.slow)]
)
def test_accumulating_4_times_32_equals_128_with_frozen_statistics(devices, mixed, loop, monkeypatch):
    if loop:  # as on GPUs and TPUs
        monkeypatch.setattr(
            step_module, "accumulated_gradient", lambda *arguments, unroll: accumulated_gradient(*arguments)
        )
    options = {"training__freeze_batch_stats": True} | mixed
    one_text, before, whole, loss = accumulation(devices, 1, **options)
    text, _, parts, same_loss = accumulation(devices, 4, **options)
    change = lambda after: jax.tree.map(np.subtract, after.params, before.params)
    assert worst(change(whole), change(parts)) < 1e-4 and same_loss == pytest.approx(loss, rel=1e-6)
    assert worst(whole.batch_stats, before.batch_stats) == worst(parts.batch_stats, before.batch_stats) == 0
    assert worst(whole.metrics, parts.metrics) < 1e-5 and int(parts.metrics.loss.count) == 128
    assert "all-gather" not in text and "all-to-all" not in text
    # The gradient crosses the links once, and not for each part: only the loss is summed for each.
    assert len(reduces(text)) <= len(reduces(one_text)) + (1 if loop else 4)
    if not mixed:  # frozen statistics are those of inference
        model, _, _ = tiny.build(tiny.config(**PLAIN), tiny.mesh())
        images = jnp.asarray((tiny.batch(128)["image"] / 255 - 0.5) / 0.25, jnp.float32)
        logits = jax.jit(model.apply)(before.variables(), images)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, tiny.batch(128)["label"]).mean()
        assert loss == pytest.approx(float(expected), rel=1e-5)


class Calls(nn.Module):
    """An attention with statistics of its own, which freeze_batch_stats does not freeze."""

    channels: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if train and not self.is_initializing():
            seen.value += x.astype(jnp.float32).mean()
        return x


@pytest.mark.parametrize("parts", [1, 2])
def test_frozen_statistics_keep_their_bits_also_where_each_device_has_its_own(parts, monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, "calls", (Calls, {}))
    scope = {"training__freeze_batch_stats": True, "training__batch_norm_scope": "device", "training__batch_size": 28}
    c = tiny.config(**scope, **tiny.ONE_BLOCK | {"model__attention": "calls"}, training__accumulation_steps=parts)
    _, state, step = tiny.build(c, tiny.mesh(7))  # a mean of seven rounds
    state = state.replace(batch_stats=perturbed(state.batch_stats))
    before = flatten_dict(jax.tree.map(np.array, state.batch_stats), sep="/")
    after, *_ = step(state, tiny.batch(28))
    for name, value in flatten_dict(after.batch_stats, sep="/").items():
        assert (np.asarray(value) == before[name]).all() != name.endswith("seen"), name


@pytest.mark.slow
def test_accumulation_moves_batch_statistics_once_a_part():
    """As the caveat says: like four steps of 32, of which each is normalised by its own statistics."""
    before, after = accumulation(2, 4)[1:3]
    _, state, step = tiny.build(tiny.config(optimizer__learning_rate=1e-30, **PLAIN), tiny.mesh(2))
    batch = tiny.batch(128)
    for part in range(4):  # the images part, part + 4, part + 8, ... of the batch
        rows = {name: values[part::4] for name, values in batch.items()}
        state, _ = step(state, next(to_devices(iter([rows]), tiny.mesh(2))))
    assert worst(jax.tree.map(np.asarray, state.batch_stats), after.batch_stats) < 1e-6
    assert worst(before.batch_stats, after.batch_stats) > 0.1


@pytest.mark.medium
def test_the_average_follows_parameters_and_statistics():
    """Against arithmetic in float64; its warm-up keeps less than `ema_decay` at first."""
    c, on = tiny.config(training__ema_decay=0.2, **PLAIN), tiny.mesh()
    _, state, step = tiny.build(c, on)
    double = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    expected = double(state.variables("raw"))
    assert worst(expected, double(state.ema)) == 0
    for t, placed in enumerate(to_devices(iter([tiny.batch(seed=s) for s in range(4)]), on)):
        state, _ = step(state, placed)
        d = [1 / 10, 2 / 11, 0.2, 0.2][t]
        expected = jax.tree.map(lambda old, now, d=d: d * old + (1 - d) * now, expected, double(state.variables("raw")))
    assert worst(expected, double(state.ema)) < 1e-6 and state.variables() is state.ema
    assert worst(double(state.ema), double(state.variables("raw"))) > 1e-4


@pytest.mark.medium
def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    _, _, after, loss = one_step(tiny.config(model__dtype="bfloat16"), 2, tiny.batch())
    for tree in (after.params, after.batch_stats, after.opt_state):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.dtype != np.int32} == {np.dtype("float32")}
    assert np.isfinite(loss)


@pytest.mark.medium
def test_training_metrics_add_up_over_devices_and_steps():
    c, on = tiny.config(optimizer__learning_rate=1e-6, **tiny.ONE_BLOCK), tiny.mesh(4)
    _, state, step = tiny.build(c, on)
    losses = []
    for placed in to_devices(iter([tiny.batch(seed=s) for s in range(3)]), on):
        state, report = step(state, placed)
        losses.append(float(report.loss))
    assert int(state.metrics.loss.count) == 48
    assert read(state.metrics)["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_evaluation_ignores_the_padding():
    c, on = tiny.config(), tiny.mesh(8)
    model, state, _ = tiny.build(c, on)
    batch = tiny.batch()
    batch["mask"] = np.arange(16) < 11
    zero = replicate(ClassificationMetrics.empty(), on)
    placed = next(to_devices(iter([batch]), on))
    sums = make_eval_step(model, c, on)(state.params, state.batch_stats, zero, placed)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = jax.jit(model.apply)(variables, np.float32((batch["image"] / 255 - 0.5) / 0.25))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])[:11].mean()
    assert int(sums.loss.count) == 11
    assert read(sums)["loss"] == pytest.approx(float(expected), rel=1e-5)
    wrong = np.argmax(np.asarray(logits), axis=-1)[:11] != batch["label"][:11]
    assert read(sums)["top1_error"] == pytest.approx(100 * wrong.mean())


def test_the_state_is_donated():
    c, on = tiny.config(), tiny.mesh()
    _, state, step = tiny.build(c, on)
    text = step.lower(state, next(to_devices(iter([tiny.batch()]), on))).as_text()
    assert len(re.findall(r"tf.aliasing_output|jax.buffer_donor", text)) >= len(jax.tree.leaves(state.params))


@pytest.mark.medium
def test_two_seeds_share_one_compiled_step():
    """The seed is an argument: the text that XLA is handed is the same, and what comes out is not."""
    on, batch, texts, losses, known = tiny.mesh(), tiny.batch(), [], [], []
    for seed in (0, 1):
        options = {"model__options": "stage_sizes=(1,), features=8, stochastic_depth=0.5", "data__mixup": 0.2}
        c = tiny.config(seed=seed, **(tiny.ONE_BLOCK | options))
        _, state, step = tiny.build(c, on)
        placed = next(to_devices(iter([batch]), on))
        texts.append(step.lower(state, placed).as_text())
        compiled, cached = compile_step(step, state, placed)()
        losses.append(float(compiled(state, placed)[1].loss))
        known.append(cached)
    assert texts[0] == texts[1] and losses[0] != losses[1] and known[1]


@pytest.mark.parametrize("hits", [["/jax/compilation_cache/cache_hits"], ["/jax/compilation_cache/other"], []])
def test_a_step_is_compiled_before_only_where_jax_says_so(hits):
    lowered = types.SimpleNamespace(compile=lambda: [jax.monitoring.record_event(event) for event in hits])
    assert step_module._compile(lowered)[1] == ("/jax/compilation_cache/cache_hits" in hits)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_cpus_compile_the_step_while_other_work_goes_on(platform):
    begun, state = threading.Event(), types.SimpleNamespace(step=jnp.zeros((), device=replicated(tiny.mesh())))

    def fail():
        begun.set()
        raise MemoryError("too large")

    step = types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=fail))
    if platform != "cpu":
        mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
        state.step = types.SimpleNamespace(sharding=types.SimpleNamespace(mesh=mesh))
    compiled = compile_step(step, state, {})
    assert begun.wait(20 if platform == "cpu" else 0.2) == (platform == "cpu")
    with pytest.raises(MemoryError, match="too large"):
        compiled()
    assert begun.is_set()


def test_the_search_for_nans_can_be_lowered_and_traced():
    c = tiny.config()
    jax.config.update("jax_debug_nans", True)
    try:
        step, state, batch = training_step(c, tiny.mesh(1))
        assert float(step.lower(state, batch).cost_analysis()["flops"]) > 0
        assert step.trace(state, batch).jaxpr.eqns
    finally:
        jax.config.update("jax_debug_nans", False)
