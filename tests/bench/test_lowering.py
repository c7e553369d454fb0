"""Every network with every attention is lowered, not compiled, for the accelerators that are not here."""

import jax
import jax.numpy as jnp
import pytest

from hga_flax.bench.compiled_step import training_step
from hga_flax.models import create_model, model_names
from hga_flax.models.registry import model_options
from tests.models.pairs import different_pairs
from tests.training import tiny

SMALL = {
    "stage_sizes": (1, 1), "block_sizes": (1, 1), "features": 16, "growth": 8, "width_divisor": 8,
}  # fmt: skip
NETWORKS = [*model_names(), "cifar_resnet8", "cifar_preact_resnet11_bottleneck", "cifar_wide_resnet10_2"]
# What a program for a GPU must not hold: with training.deterministic each of these comes with a sort of the whole map.
SORTED = ("select_and_scatter", "stablehlo.scatter", "stablehlo.sort")
FAST = [("resnet50", "hga"), ("resnet50", "se"), ("densenet121", "eca"), ("cifar_resnet8", "ge")]


def small(network):
    """The options that make a network small, of which some networks fix what others leave open."""
    known = model_options(network)
    options = {name: value for name, value in SMALL.items() if name in known}
    if network == "resnest50d_4s2x40d":
        options["features"] = 32  # which its radix and cardinality divide
    try:
        create_model(network, **options)
    except ValueError:
        return {}
    return options


def check(network, attention):
    options = small(network)
    c = tiny.config(
        model__name=network,
        model__attention=attention,
        model__options=", ".join(f"{name}={value!r}" for name, value in options.items()),
        model__dtype="bfloat16",
        data__image_size=64,
        training__batch_size=2,
    )
    step, state, batch = training_step(c, tiny.mesh(1))
    program = step.trace(state, batch)
    assert not any(word in program.lower(lowering_platforms=("cuda",)).as_text() for word in SORTED)
    assert "stablehlo.convolution" in program.lower(lowering_platforms=("tpu",)).as_text()


PAIRS = [pair for pair in different_pairs(NETWORKS, small) if pair not in FAST]


@pytest.mark.medium
@pytest.mark.parametrize(("network", "attention"), FAST)
def test_a_step_lowers_for_gpus_without_sort_and_scatter_and_for_tpus(network, attention):
    check(network, attention)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "attention"), PAIRS)
def test_every_step_lowers_for_gpus_without_sort_and_scatter_and_for_tpus(network, attention, short_googlenet):
    check(network, attention)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_losses_pick_by_a_mask_on_gpus_and_a_label_that_is_no_class_is_nan_everywhere(loss, monkeypatch):
    from hga_flax import platforms
    from hga_flax.training.metrics import LOSSES

    logits, labels = jnp.arange(12.0).reshape(4, 3) ** 0.5, jnp.array([0, 2, 1, 3])
    function = jax.value_and_grad(lambda x, labels: LOSSES[loss](x, labels, 0.1)[:3].sum())
    text = jax.jit(function).trace(logits, labels).lower(lowering_platforms=("cuda",)).as_text()
    assert not any(word in text for word in SORTED)
    plain = function(logits, labels), LOSSES[loss](logits, labels, 0.1)
    monkeypatch.setattr(platforms.lax, "platform_dependent", lambda *a, cuda, **others: cuda(*a))
    masked = function(logits, labels), LOSSES[loss](logits, labels, 0.1)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(masked), strict=True):
        assert jnp.allclose(a, b, rtol=1e-6, equal_nan=True)
    assert jnp.isnan(masked[1][3]) and jnp.isfinite(masked[1][:3]).all()
