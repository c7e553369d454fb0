import importlib
import json
import os

import jax
import jax.numpy as jnp
import pytest

from hga_flax.__main__ import main
from hga_flax.bench import step as module
from hga_flax.bench.race import benchmarks_of_others
from hga_flax.bench.step import table
from hga_flax.counting.complexity import complexity
from hga_flax.errors import UserError
from hga_flax.models import create_model
from hga_flax.processes.settings import DETERMINISTIC_FLAGS
from tests.training import tiny

COMMAND = ["bench", "step", "--models=cifar_resnet8:none,cifar_resnet8:se", "--image-size=16", "--batch=4"]


@pytest.mark.medium
def test_its_rows_hold_what_was_measured(capsys):
    main([*COMMAND, "--steps=2", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["attention"]) for row in rows] == [
        ("cifar_resnet8", "none"), ("cifar_resnet8", "se")
    ]  # fmt: skip
    assert rows[0]["ratio_to_first"] == 1 and rows[0]["params"] < rows[1]["params"]
    for row in rows:
        assert 0 < row["fastest_ms"] <= row["step_ms"] and row["compile_s"] > 0
        assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"])
        assert row["flops_per_s"] > 0 and row["peak_memory_bytes"] > 0 and row["devices"] == 4
        assert row["peak_share"] is None  # nobody publishes a CPU's
    assert "0.0 %" not in table(rows) and "cifar_resnet8" in table(rows)


def test_its_flags_are_set_before_it_touches_a_device(monkeypatch):
    """As in train.py: on a GPU they count when the first device is touched, and never again."""

    class Touched(Exception):
        pass

    def touch():
        raise Touched

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", touch)
    monkeypatch.setattr(jax, "devices", touch)
    with pytest.raises(Touched):
        main(COMMAND)
    assert os.environ["XLA_FLAGS"] == " ".join(DETERMINISTIC_FLAGS)


@pytest.mark.medium
def test_on_cpus_all_operations_are_counted(capsys):
    """Three times the forward pass, as counting/complexity.py knows it, less what meets margins or the images."""
    main([*COMMAND, "--steps=1", "--json"])
    row = json.loads(capsys.readouterr().out)[0]
    multiplications = complexity(create_model("cifar_resnet8", num_classes=1000), (16, 16, 3)).conv_fc_macs
    per_step = row["flops_per_s"] * row["step_ms"] / 1e3
    assert 0.85 < per_step / (3 * 4 * 2 * multiplications) < 1


def test_its_state_is_random_where_training_begins_with_random_numbers():
    c = module.configuration("cifar_resnet8", "none", 4, 16, "float32")
    from hga_flax.bench.compiled_step import training_step

    _, shapes, _ = training_step(c, tiny.mesh(1))
    state = module.random_state(shapes)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert all(leaf.std() > 0 for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state.opt_state))


def test_outside_the_clone_the_networks_of_others_are_asked_for_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: exec("import no_benchmarks_here"))
    with pytest.raises(ModuleNotFoundError, match="no_benchmarks_here"):  # ours is not what is missing
        benchmarks_of_others("loaders", "bench input --compare")

    def missing(name):
        raise ModuleNotFoundError("No module named 'benchmarks'", name="benchmarks")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"^bench input --compare: benchmarks/loaders\.py is not here; start"):
        benchmarks_of_others("loaders", "bench input --compare")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models=resnet50"], "'resnet50' is not NETWORK:ATTENTION"),
        (["--models=resnet51:se"], "did you mean 'resnet5"),
        (["--models=resnet50:none,resnet50:sse"], "unknown attention 'sse'"),
        (["--batch=0"], "--batch=0: must be positive"),
        (["--image-size=0"], "--image-size=0"),
        (["--config.seed=1"], "bench takes no configuration"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["bench", "step", *arguments])
