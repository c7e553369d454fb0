"""Checks networks with rule-made weights against torchvision's and timm's outputs (`models` of `tests.goldens`)."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hga_flax.errors import UserError
from hga_flax.models.torch_weights import torch_model, variables_from_torch

MODELS_TOLERANCE = 1e-3


def rule_tensor(name: str, shape: list[int]) -> np.ndarray:
    """Returns the tensor that golden/README.md's rule makes from its name."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(normal)
    if name.endswith(("running_mean", "bias")):
        return 0.1 * normal
    if len(shape) == 1:
        return 1 + 0.1 * normal
    return normal * np.sqrt(2 / np.prod(shape[1:]))


def golden_input() -> jax.Array:
    """Returns the two images of golden/README.md, `[2, 96, 96, 3]`."""
    images = np.random.RandomState(0).standard_normal((2, 3, 96, 96))
    return jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float32)


def check_model(key: str, case: dict, relative_error) -> tuple[float, bool]:
    """Returns the largest relative error of a case's values and whether the top classes agree.

    Raises:
        UserError: the network is unknown, or has another number of parameters or other tensors.
    """
    kind, _, name = key.partition(":")
    if kind not in ("tv", "timm"):
        raise UserError(f"golden case '{key}': the name must start with tv: or timm:")
    tensors = {name: rule_tensor(name, shape) for name, shape in case["tensors"].items()}
    try:
        model = torch_model(name, tensors)
    except ValueError as error:
        raise UserError(f"golden case '{key}': {error}") from None
    variables = variables_from_torch(name, tensors, model)
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    if params != case["params"]:
        raise UserError(f"golden case '{key}' has {case['params']} parameters, ours {params}")
    logits = np.asarray(jax.jit(partial(model.apply, train=False))(variables, golden_input()), np.float64)
    golden = np.asarray(case["logits"])
    errors = [
        relative_error(logits[:, : golden.shape[1]], golden),
        relative_error(np.linalg.norm(logits, axis=1), case["norm"]),
    ]
    return max(errors), logits.argmax(axis=1).tolist() == list(case["argmax"])


def check_models(cases: dict, relative_error) -> tuple[float, bool]:
    """Prints one line per network; returns the largest relative error and whether all top classes agree."""
    worst, agree = 0.0, True
    for key, case in cases.items():
        error, same = check_model(key, case, relative_error)
        print(f"{key:<26} relative error {error:.2e}  argmax {'agrees' if same else 'DIFFERS'}", flush=True)
        worst, agree = max(worst, error), agree and same
    return worst, agree
