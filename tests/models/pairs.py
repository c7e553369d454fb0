"""Pairs of a network and an attention: which are one check, and a gradient step of one."""

import re
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hga_flax.attention import attention_names
from hga_flax.models import create_model
from hga_flax.models.res2net import Res2Net
from hga_flax.models.resnest import ResNeSt
from hga_flax.models.resnet import ResNet
from hga_flax.platforms import programs_for
from tests.reference import sample

# The blocks of each of these end alike whatever their options (`finish_bottleneck`): an attention is called with the
# same number of channels and the same map, so that resnext101_32x8d with ECA can fail only where resnet50 with ECA or
# resnext101_32x8d with another attention does.
ENDS_ALIKE = (ResNet, Res2Net, ResNeSt)
# These every network is checked with. HGA reads the 1x1 before it too, whose width differs, and SK replaces the 3x3.
EVERYWHERE = ("none", "hga", "sk")


def has_place(name: str, attention: str) -> bool:
    return attention != "sk" or not re.match("googlenet|densenet|vgg|res2ne|resnest", name)


def different_pairs(names: Iterable[str], options: Callable[[str], dict]) -> list[tuple[str, str]]:
    """Returns the pairs (network, attention) to be checked of networks that `options(name)` makes small.

    What differs between resnet50 and resnet101 is gone then, and the first stands for both.
    """
    found: dict[tuple[str, str], str] = {}
    for name in names:
        model = create_model(name, **options(name))
        for attention in filter(lambda attention: has_place(name, attention), attention_names()):
            shared = isinstance(model, ENDS_ALIKE) and attention not in EVERYWHERE
            found.setdefault((type(model).__name__ if shared else repr(model), attention), name)
    return [(name, attention) for (_, attention), name in found.items()]


def tiny_options(name: str) -> dict:
    if name.startswith("cifar_"):
        return {"features": 4}
    if "densenet" in name:
        return {"block_sizes": (1, 1), "growth": 4, "features": 8}
    if name.startswith("vgg"):
        return {"stage_sizes": (1, 1), "features": 8, "hidden": 16}
    if name.startswith("resnest"):
        return {"stage_sizes": (1,), "features": 32}
    if name.startswith("res2ne"):
        return {"stage_sizes": (1,), "features": 64, "width_per_group": 8}
    return {"width_divisor": 8, "aux_logits": True} if name == "googlenet" else {"stage_sizes": (1,), "features": 16}


def he_variables(model: nn.Module, x: jax.Array) -> dict:
    """Returns variables made in NumPy: compiling the initialisation would take longer than the step."""
    random = np.random.RandomState(0)

    def value(path, leaf):
        if leaf.ndim < 2:
            return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)
        return np.float32(random.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(value, dict(jax.eval_shape(model.init, jax.random.key(0), x)))


def gradient_step(model: nn.Module) -> tuple[float, float, float]:
    """Returns the loss before and after a small step on one batch, and the norm of the attention's gradient."""
    x, labels = np.float32(sample((4, 32, 32, 3))), jnp.arange(4)
    variables = he_variables(model, x)
    params, _ = variables.pop("params"), variables.pop("intermediates", None)

    def loss(params, x):
        rngs = {"dropout": jax.random.key(2)}
        logits, updated = model.apply(
            {"params": params, **variables}, x, train=True, mutable=["batch_stats", "aux_logits"], rngs=rngs
        )
        heads = [logits, *jax.tree.leaves(updated.get("aux_logits", {}))]
        losses = [optax.softmax_cross_entropy_with_integer_labels(head, labels).mean() for head in heads]
        return losses[0] + 0.3 * sum(losses[1:])

    step = jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})
    with programs_for(jax.devices()[0]):
        compiled = step.lower(params, x).compile()
    before, gradient = jax.device_get(compiled(params, x))  # NumPy compiles nothing for each shape
    length = lambda tree: np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(tree)))
    norm = length(gradient)
    # A short step: over single positions of four images BatchNorm is steep (gradients of norm 1000).
    after, _ = compiled(jax.tree.map(lambda p, g: np.float32(p - 2e-5 * g / norm), params, gradient), x)
    attention = [g for path, g in jax.tree_util.tree_leaves_with_path(gradient) if "'attention'" in str(path)]
    return float(before), float(after), float(length(attention))


def check_gradient_step(name: str, attention: str) -> None:
    before, after, norm = gradient_step(create_model(name, attention=attention, num_classes=5, **tiny_options(name)))
    assert after < before  # a NaN fails too
    assert (norm > 0) == (attention != "none")
