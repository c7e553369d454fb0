"""Checks a public CIFAR checkpoint against an independent program's logits (`cifar` of `tests.goldens`)."""

import io
import pathlib
import re
import tarfile
from collections.abc import Callable, Iterable

import jax
import numpy as np

from hga_flax.errors import UserError
from hga_flax.images.device_augmentation import normalize
from hga_flax.inference.from_weights import restore_weights
from hga_flax.inference.predictor import Predictor

CIFAR_TOLERANCE = 1e-4


def read_images(names: Iterable[str], place: pathlib.Path) -> dict[str, bytes]:
    """Returns the encoded images of the names, "airplane/0000.jpg", from a folder or a tar archive.

    Raises:
        UserError: one of them is not there.
    """
    wanted = set(names)
    if place.is_dir():
        found = {name: (place / name).read_bytes() for name in wanted if (place / name).is_file()}
    elif place.is_file():
        found = {}
        with tarfile.open(fileobj=io.BytesIO(place.read_bytes())) as archive:
            for member in archive:
                name = "/".join(member.name.split("/")[-2:])
                if name in wanted and member.isfile():
                    found[name] = archive.extractfile(member).read()
    else:
        raise UserError(f"{place}: no such folder or archive; name where the test images lie: cifar FILE IMAGES")
    missing = sorted(wanted - set(found))
    if missing:
        raise UserError(f"{place} does not have {missing[0]}")
    return found


def check_cifar(
    golden: dict, path: pathlib.Path, images: str | None, relative_error: Callable[..., float], model: str | None = None
) -> float:
    """Prints one line an image and returns the largest relative error of its logits.

    Args:
        golden: the file: `checkpoint`, `classes`, and `logits` by the image's name; `model` if the checkpoint's name
            does not begin with the network's.
        path: of the file; the checkpoint lies beside it.
        images: a folder or archive of the test images; None: ../cifar10_jpeg/test.tar.xz beside the file's folder.
        relative_error: of two arrays.
        model: our network.

    Raises:
        UserError: the checkpoint or an image cannot be read.
    """
    checkpoint = path.parent / golden["checkpoint"]
    match = re.match(r"(cifar10?_)?(resnet\d+)", golden.get("model") or checkpoint.name)
    if not model and not match:
        raise UserError(f"{checkpoint.name}: no network shows in the name; add a key 'model'")
    restored = restore_weights(str(checkpoint), model or f"cifar_{match[2]}")
    predictor = Predictor(restored)
    place = pathlib.Path(images) if images else path.parent.parent / "cifar10_jpeg" / "test.tar.xz"
    encoded = read_images(golden["logits"], place)
    data, network = restored.experiment.config.data, restored.experiment.model
    pixels = np.stack([predictor.load(encoded[name]) for name in golden["logits"]])
    forward = jax.jit(lambda v, x: network.apply(v, normalize(x, data.mean, data.std), train=False))
    ours = np.asarray(forward(restored.variables, pixels), np.float64)
    names = list(predictor.class_names)
    order = [names.index(name) for name in golden["classes"]]
    worst = 0.0
    for row, (name, logits) in zip(ours, golden["logits"].items(), strict=True):
        error = relative_error(row[order], logits)
        print(f"{name:<24} relative error {error:.2e}", flush=True)
        worst = max(worst, error)
    return worst
