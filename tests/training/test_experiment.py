import dataclasses
import logging
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from hga_flax.attention import registry
from hga_flax.data.sources import DatasetInfo, SyntheticSource
from hga_flax.errors import UserError
from hga_flax.processes.settings import configure_process
from hga_flax.training import experiment as e
from tests.training import tiny

INFO = DatasetInfo("digits", 10, 1, ())


def test_the_plan_turns_epochs_into_steps():
    plan = e.make_plan(tiny.config(training__steps=0, training__epochs=3.0), 40)
    assert (plan.steps_per_epoch, plan.total_steps, plan.eval_every) == (2.5, 8, 2.5)
    assert [s for s in range(1, 9) if plan.evaluates_at(s)] == [2, 5, 8]
    assert plan.evaluations == 3
    plan = e.make_plan(tiny.config(training__steps=7, evaluation__every_epochs=2.0), 40)
    assert [s for s in range(1, 8) if plan.evaluates_at(s)] == [5, 7]
    with pytest.raises(UserError, match="only 10 examples"):
        e.make_plan(tiny.config(), 10)


@pytest.mark.parametrize("every", [0.25, 0.5, 1.0, 3.0, 7.3])
@pytest.mark.parametrize(("examples", "batch", "epochs"), [(1_281_167, 1024, 100), (1_281_167, 256, 90), (50, 16, 40)])
def test_evaluations_do_not_drift_from_the_epochs(examples, batch, epochs, every):
    c = tiny.config(
        training__steps=0, training__epochs=float(epochs), training__batch_size=batch, evaluation__every_epochs=every
    )
    plan = e.make_plan(c, examples)
    steps = [s for s in range(1, plan.total_steps + 1) if plan.evaluates_at(s)]
    multiples = [round(k * every * examples / batch) for k in range(1, int(epochs / every) + 1)]
    assert steps == sorted({*(max(1, s) for s in multiples), plan.total_steps})
    assert plan.evaluations == len(steps)
    if epochs % every == 0 and every * examples / batch >= 1:
        assert len(steps) == epochs / every  # the last multiple is the end; not one beside it


def test_the_parts_follow_from_the_configuration():
    experiment = e.create_experiment(tiny.config(), INFO)
    assert experiment.image_shape == (8, 8, 1) and experiment.model.num_classes == 10
    assert experiment.model.axis_name == "data"
    assert experiment.eval_batch_size == 16
    experiment = e.create_experiment(tiny.config(training__batch_norm_scope="device", evaluation__batch_size=8), INFO)
    assert experiment.model.axis_name is None and experiment.eval_batch_size == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training__batch_size": 12}, "training.batch_size=12: does not divide over 8 devices"),
        ({"evaluation__batch_size": 12}, "evaluation.batch_size=12: does not divide over 8 devices"),
        ({"data__mean": (0.5, 0.5, 0.5)}, "digits has 1 channel;"),
        ({"training__batch_norm_scope": "device", "training__batch_size": 8}, "leaves each of the 8 devices one image"),
        (
            {"training__accumulation_steps": 4},
            "does not divide the 2 images of each of the 8 devices; training.batch_size=",
        ),
        ({"training__accumulation_steps": 2, "data__mixup": 0.2}, "an even number of images in each of the 2 parts of"),
        (
            {"training__accumulation_steps": 2, "training__batch_norm_scope": "device"},
            "one image in each of the 2 parts of .*training.batch_size=32",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_data_is_opened(overrides, message):
    with pytest.raises(UserError, match=message):
        e.create_experiment(tiny.config(**overrides), INFO)


def test_a_batch_of_one_image_a_part_needs_no_statistics_where_they_are_frozen():
    c = tiny.config(
        training__accumulation_steps=2, training__batch_norm_scope="device", training__freeze_batch_stats=True
    )
    e.create_experiment(c, INFO)


def test_evaluation_may_have_its_own_size():
    experiment = e.create_experiment(tiny.config(evaluation__image_size=12), INFO)
    assert (experiment.image_shape, experiment.eval_image_shape) == ((8, 8, 1), (12, 12, 1))
    assert experiment.dataset.eval_size == 12
    assert e.create_experiment(tiny.config(), INFO).eval_image_shape == (8, 8, 1)
    plan, _, _, state = e.prepare(experiment)
    rows = dict(e.describe(experiment, plan, state.params))
    assert rows["images"] == "8x8x1, evaluated at 12x12, 10 classes"


def test_a_run_describes_itself():
    experiment = e.create_experiment(tiny.config(), INFO)
    params = jax.eval_shape(experiment.init(experiment.optimizer(0.1)), jax.random.key(0)).params
    rows = dict(e.describe(experiment, e.make_plan(experiment.config, 48), params))
    total = sum(p.size for p in jax.tree.leaves(params))
    parts = dict(part.rsplit(" ", 1) for part in rows["parameters"].split(", "))
    assert set(parts) == {"stem", "stage1", "stage2", "stage3", "classifier", "attention"}
    assert sum(int(size.replace(",", "_")) for size in parts.values()) == total
    assert f"{total:,} parameters" in rows["size"] and "GFLOPs" in rows["size"]
    assert rows["devices"].startswith("8 x cpu") and rows["devices"].endswith("2 images each")
    assert "(synthetic)" in rows["data"] and rows["plan"] == "6 steps of 16 = 2 epochs"


def test_a_run_that_ends_within_its_warm_up_says_so():
    experiment = e.create_experiment(tiny.config(schedule__warmup_steps=400), INFO)
    plan = dict(e.describe(experiment, e.make_plan(experiment.config, 48), {}))["plan"]
    assert plan == "6 steps of 16 = 2 epochs, all within the warm-up of 400 steps"


def test_a_run_that_ends_before_a_decay_says_so():
    c = tiny.config(schedule__name="step", schedule__decay_at_steps=(3, 6, 32000), schedule__warmup_steps=400)
    experiment = e.create_experiment(c, INFO)
    plan = dict(e.describe(experiment, e.make_plan(experiment.config, 48), {}))["plan"]
    assert plan.endswith("2 epochs, all within the warm-up of 400 steps, before the decays at 6 and 32,000")


def test_everything_is_checked_before_an_image_is_read(monkeypatch):
    monkeypatch.setattr(SyntheticSource, "__getitem__", None)
    prepared = e.prepare(e.create_experiment(tiny.config(), INFO))
    assert prepared.plan.num_examples == 48 and float(prepared.schedule(0)) == pytest.approx(0.05)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(prepared.state))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training__batch_size": 56}, "only 48 examples"),
        ({"training__steps": 2**31 - 1}, "exceed the limit of 2,147,483,647 examples per process"),
        ({"training__steps": 0, "schedule__warmup_epochs": 100.0}, r"schedule\.warmup_epochs=100\.0: a warm-up of 300"),
        ({"model__attention_options": "form='shift', mfe_norm=True"}, "cannot be trained: form='shift' needs a linear"),
        (
            {"model__options": "stochastic_depth=1.0"},
            "config.model cannot be built: stochastic_depth=1.0 must be at least 0 and less than 1",
        ),
        (
            {
                "model__attention": "ge",
                "model__attention_options": "mlp=False, learned=True",
                "evaluation__image_size": 16,
            },
            r"evaluation\.image_size=16: this network can be evaluated only at the size it is trained at",
        ),
    ],
)
def test_what_only_the_data_or_the_network_shows_is_refused_before_compilation(overrides, message):
    with pytest.raises(UserError, match=message):
        e.prepare(e.create_experiment(tiny.config(**overrides), INFO))


def test_one_class_is_refused_in_training_alone():
    """Its loss would be 0 and its error 0 %."""
    one = dataclasses.replace(INFO, num_classes=1, class_names=("images",))
    with pytest.raises(UserError, match=r"has only one class, 'images': training needs at least two$"):
        e.create_experiment(tiny.config(), one)
    with pytest.raises(UserError, match=r"two; is data\.dir one level too high\?$"):
        e.create_experiment(tiny.config(data__name="folder"), one)
    e.create_experiment(tiny.config(), one, train=False)


def test_an_attention_whose_operations_cannot_be_counted_is_described_all_the_same(monkeypatch):
    class Loop(nn.Module):
        channels: int
        dtype: object = None
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x, train=False):
            turns = lambda x: jax.lax.while_loop(lambda y: (y < 0).any(), lambda y: y @ jnp.eye(self.channels), x)
            return x + jax.lax.stop_gradient(turns(x * 0))

    monkeypatch.setitem(registry._REGISTRY, "loop", (Loop, {}))
    experiment = e.create_experiment(tiny.config(model__attention="loop"), INFO)
    prepared = e.prepare(experiment)
    rows = dict(e.describe(experiment, prepared.plan, prepared.state.params))
    assert re.fullmatch(r"[\d,]+ parameters; cannot count the operations of a 'while': .*", rows["size"])


def test_an_evaluation_asks_for_less_than_a_training(tmp_path):
    c = tiny.config(training__batch_size=1, training__compilation_cache="/dev/null/xla", evaluation__batch_size=8)
    cache, level = jax.config.jax_compilation_cache_dir, logging.getLogger("absl").level
    assert e.create_experiment(c, INFO, train=False).eval_batch_size == 8
    assert jax.config.jax_compilation_cache_dir == cache  # which commands set, and not the library
    try:
        configure_process(c, train=False)
        assert jax.config.jax_compilation_cache_dir is None  # one that cannot be written to is done without
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        logging.getLogger("absl").setLevel(level)
    with pytest.raises(UserError, match=r"^training\.batch_size=1: "):
        e.create_experiment(c, INFO)
