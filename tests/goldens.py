"""Checks the project against files of values from independent references.

    python -m tests.goldens hga FILE      both forms of the mechanism; last line: max relative error X
    python -m tests.goldens models FILE   networks against torchvision's and timm's; the same last line
    python -m tests.goldens cifar FILE [IMAGES]   a public CIFAR checkpoint against PyTorch's logits; the same

Exits with 1 where an error passes the tolerance, or a network's top class differs. The files'
format: tests/golden/README.md.
"""

import argparse
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from hga_flax.attention import HGA, HierarchicalGlobalAveragePooling, MultiScaleFeatureExploitation
from hga_flax.errors import UserError, run_main
from tests.goldens_cifar import CIFAR_TOLERANCE, check_cifar
from tests.goldens_models import MODELS_TOLERANCE, check_models

KERNELS = (1, 3, 5, 7)
BINS = (1, 2, 4)
HGA_TOLERANCE = 1e-4


def relative_error(ours, golden, scale: float = 0.0) -> float:
    """Returns ||ours - golden|| / max(||golden||, scale); NaN counts as infinite."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    if ours.shape != golden.shape:
        raise UserError(f"golden of shape {golden.shape} cannot be compared with ours of shape {ours.shape}")
    error = np.linalg.norm(ours - golden) / max(np.linalg.norm(golden), scale)
    return float(error) if np.isfinite(error) else float("inf")


def hga_weight(name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Returns the rule-made weight of golden/README.md."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * scale


def hga_params(channels: int, width: int) -> dict:
    """Returns the HGA's parameter tree for maps of `channels`, working on `width` channels."""
    hidden, cells = width // 4, sum(j * j for j in BINS)
    # PyTorch's depthwise kernels are [C, 1, k, k]; ours [k, k, 1, C].
    mfe = {f"kernel_{k}": hga_weight(f"conv{k}", (width, 1, k, k), 1 / k).transpose(2, 3, 1, 0) for k in KERNELS}
    params = {
        "mfe": mfe,
        "ee": {
            "suppress": hga_weight("fc1", (cells, width, hidden), (cells * width) ** -0.5),
            "excite": hga_weight("fc2", (hidden, width), hidden**-0.5),
        },
    }
    if channels != width:
        params["reduce"] = {"kernel": hga_weight("reduce", (channels, width), channels**-0.5)}
        params["restore"] = {"kernel": hga_weight("restore", (width, channels), width**-0.5)}
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)


def check_hga_case(case: dict, form: str) -> dict[str, float]:
    """Returns the relative error of each golden value of a case, computed in float32 in one form."""
    height, width, channels, reduced = case["H"], case["W"], case["A"], case["C"]
    x = np.random.RandomState(7).standard_normal((2, channels, height, width))
    x = jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32)
    params = hga_params(channels, reduced)
    module = HGA(channels, reduced_channels=reduced, form=form)
    y, sown = module.apply({"params": params}, x, mutable=["intermediates"])
    sown = sown["intermediates"]

    z = x @ params["reduce"]["kernel"] if "reduce" in params else x
    mfe = MultiScaleFeatureExploitation(reduced, KERNELS).bind({"params": params["mfe"]})
    if form == "shift":
        cells = mfe.pooled(z, BINS)  # [B, S, cells, C]
    else:
        pooled = HierarchicalGlobalAveragePooling(BINS).apply({}, mfe(z))
        cells = pooled.reshape(*pooled.shape[:2], len(KERNELS), reduced).swapaxes(1, 2)
    cells, y = np.asarray(cells, np.float64), np.asarray(y, np.float64)
    gate = np.asarray(sown["gate"][0])
    return {
        "pooled_first": relative_error(cells[0, :, :, 0].reshape(-1), case["pooled_first"]),
        # A sum of values of both signs may come out near zero: its rounding scales with the norm.
        "pooled_sum": relative_error(cells.sum(), case["pooled_sum"], np.linalg.norm(cells)),
        "e": relative_error(sown["excitation"][0], case["e"]),
        "gate": relative_error(gate[:, : len(case["gate"][0])], case["gate"]),
        "y_sum": relative_error(y.sum(), case["y_sum"], case["y_norm"]),
        "y_norm": relative_error(np.linalg.norm(y), case["y_norm"]),
    }


def check_hga(cases: dict) -> float:
    """Prints one line per case and returns the largest relative error over cases, forms and values."""
    worst = 0.0
    for name, case in cases.items():
        errors = {form: check_hga_case(case, form) for form in ("conv", "shift")}
        largest = {form: max(values.items(), key=lambda item: item[1]) for form, values in errors.items()}
        print(f"{name:<16}" + "".join(f"  {form} {error:.2e} ({key})" for form, (key, error) in largest.items()))
        worst = max([worst] + [error for _, error in largest.values()])
    return worst


def load(path: str) -> dict:
    """Reads a golden file.

    Raises:
        UserError: the file cannot be read or is not a JSON object.
    """
    try:
        cases = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read golden file {path}: {error}") from None
    if not isinstance(cases, dict) or not cases:
        raise UserError(f"golden file {path} holds no cases")
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("hga", help="the mechanism, in both forms").add_argument("file")
    kinds.add_parser("models", help="networks with rule-made weights").add_argument("file")
    cifar = kinds.add_parser("cifar", help="a public CIFAR checkpoint in the folder of the file")
    cifar.add_argument("file")
    cifar.add_argument("images", nargs="?", help="folder or archive (default: ../cifar10_jpeg/test.tar.xz)")
    arguments = parser.parse_args()
    cases = load(arguments.file)
    agree = True
    try:
        if arguments.kind == "hga":
            worst, tolerance = check_hga(cases), HGA_TOLERANCE
        elif arguments.kind == "cifar":
            path = pathlib.Path(arguments.file)
            worst, tolerance = check_cifar(cases, path, arguments.images, relative_error), CIFAR_TOLERANCE
        else:
            (worst, agree), tolerance = check_models(cases, relative_error), MODELS_TOLERANCE
    except KeyError as error:
        raise UserError(f"golden file {arguments.file}: a case lacks {error}") from None
    print(f"max relative error {worst:.2e}")
    return 0 if worst <= tolerance and agree else 1


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the tolerances are for float32 on a CPU
    run_main(main)
