"""Checks networks with rule-made weights against torchvision's and timm's outputs (`models` of `tests.goldens`)."""

import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hga_flax.errors import UserError
from hga_flax.pretrained.torch_weights import torch_model, variables_from_torch

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


def golden_input() -> np.ndarray:
    """Returns the two images of golden/README.md, `[2, 96, 96, 3]`."""
    images = np.random.RandomState(0).standard_normal((2, 3, 96, 96))
    return images.transpose(0, 2, 3, 1)


def our_logits(key: str, case: dict, dtype) -> np.ndarray:
    """Returns our network's logits for the golden input, computed in `dtype`.

    Raises:
        UserError: the network is unknown, or has another number of parameters or other tensors.
    """
    kind, _, name = key.partition(":")
    if kind not in ("tv", "timm"):
        raise UserError(f"golden case '{key}': the name must start with tv: or timm:")
    tensors = {name: rule_tensor(name, shape) for name, shape in case["tensors"].items()}
    try:
        model = torch_model(name, tensors, dtype=dtype)
    except ValueError as error:
        raise UserError(f"golden case '{key}': {error}") from None
    variables = variables_from_torch(name, tensors, model, dtype)
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    if params != case["params"]:
        raise UserError(f"golden case '{key}' has {case['params']} parameters, ours {params}")
    logits = jax.jit(partial(model.apply, train=False))(variables, jnp.asarray(golden_input(), dtype))
    return np.asarray(logits, np.float64)


def check_model(key: str, case: dict, relative_error: Callable[..., float], dtype) -> tuple[float, bool]:
    """Returns the larger relative error of a case's logits and norms, and whether the top classes agree."""
    logits, golden = our_logits(key, case, dtype), np.asarray(case["logits"])
    errors = [
        relative_error(logits[:, : golden.shape[1]], golden),
        relative_error(np.linalg.norm(logits, axis=1), case["norm"]),
    ]
    return max(errors), logits.argmax(axis=1).tolist() == list(case["argmax"])


def check_models(cases: dict, relative_error: Callable[..., float]) -> tuple[float, bool]:
    """Prints one line per network; returns the largest relative error and whether all top classes agree.

    Networks are computed in float32. Deep SE networks with rule-made weights are ill-conditioned:
    their activations grow to a size at which each gate is a step, and rounding decides which channels
    pass (PyTorch's own float32 misses its float64 by 0.34 in seresnet152). A network that fails in
    float32 is computed again in float64, which tells rounding from a wrong network and decides.
    A network that this project does not have counts as an infinite error.
    """
    worst, agree = 0.0, True
    for key, case in cases.items():
        try:
            error, same = check_model(key, case, relative_error, jnp.float32)
        except UserError as failure:  # one network that cannot be checked must not hide the others
            print(f"{key:<26} not checked: {failure}", flush=True)
            worst, agree = float("inf"), False
            continue
        note = ""
        if error > MODELS_TOLERANCE or not same:
            note = f"  (in float64; in float32 {error:.2e}: ill-conditioned)"
            with jax.enable_x64(True):
                error, same = check_model(key, case, relative_error, jnp.float64)
            note = note if error <= MODELS_TOLERANCE and same else "  (in float32 and in float64)"
        print(f"{key:<26} relative error {error:.2e}  argmax {'agrees' if same else 'DIFFERS'}{note}", flush=True)
        worst, agree = max(worst, error), agree and same
    return worst, agree
