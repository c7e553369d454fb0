"""`python -m hga_flax export`: writes the network of a run to one file, after checking it against the checkpoint.

The exported network takes raw images, uint8 `[batch, height, width, channels]` with any batch size, and returns
"logits" and "probabilities", float32 `[batch, classes]`. It includes normalisation and softmax, but not decoding
and cropping (their sizes are in the metadata). It computes in float32, whatever dtype the run used.
An ONNX file stores the metadata as JSON values. StableHLO has no place for metadata, so it is written to PATH.json.
`--format=safetensors` writes only the weights, for PyTorch (`export_weights.py`).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hga_flax.config.command_line import add_import_flag, add_weights_flags, check_weights_flags, names_weights
from hga_flax.errors import UserError, expand, one_line
from hga_flax.images.bad_images import BadImage
from hga_flax.inference import export_weights as weights
from hga_flax.inference.fold import fold
from hga_flax.inference.from_weights import describe_weights, restore_given
from hga_flax.inference.predictor import Predictor
from hga_flax.inference.to_stablehlo import load, to_stablehlo
from hga_flax.runs.console import Console
from hga_flax.training.evaluation import apply_network
from hga_flax.training.restore import configure_for
from hga_flax.version import __version__

CHECKED = 16  # number of images on which the file is compared with the checkpoint
TOLERANCE = 1e-4  # largest allowed difference of a logit, relative to the largest logit
Network = Callable[[Any], dict[str, Any]]  # images -> logits and probabilities


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_weights_flags(parser)
    parser.add_argument("--format", required=True, choices=("stablehlo", "onnx", "safetensors"), help="file format")
    parser.add_argument("--out", required=True, metavar="PATH", help="output file; an existing one is replaced")
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|latest|STEP", help="checkpoint to load (default: best)"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of the data set, if it has moved (default: the run's data.dir)"
    )
    add_import_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    """Exports the network, or its weights, to a file.

    Raises:
        UserError: there is no such run, the file cannot be written, packages are missing, or the file's results
            differ from the checkpoint's; in each case an existing file stays unchanged.
    """
    check_weights_flags(arguments)
    out = pathlib.Path(os.path.realpath(expand(arguments.out, "--out")))  # a link is followed, not replaced
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise UserError(f"--out={arguments.out}: is a device or a pipe, not a file")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={arguments.out}: {'is a folder' if out.is_dir() else 'the folder does not exist'}")
    if arguments.format == "onnx":
        _check_onnx()
    if arguments.format == "safetensors" and out.suffix != weights.SUFFIX:
        raise UserError(f"--out={arguments.out}: the name must end in {weights.SUFFIX}, which its readers expect")
    predictor = _predictor(arguments)
    if arguments.format == "safetensors":
        return _export_weights(predictor, arguments, out)
    network, facts = inference_network(predictor), metadata(predictor)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *predictor.image_shape), jnp.uint8)
    folded = fold(network, images)
    scratch = _scratch(out)
    beside = []  # (scratch, final path) of files next to the exported one
    with _cleared(scratch), _cleared(facts_scratch := _scratch(out, ".json")):
        try:
            if arguments.format == "onnx":
                from hga_flax.inference.to_onnx import to_onnx

                model = to_onnx(folded, images, {key: json.dumps(value) for key, value in facts.items()})
                scratch.write_bytes(model.SerializeToString())
            else:
                scratch.write_bytes(to_stablehlo(folded, images))
                facts_scratch.write_text(json.dumps(facts, indent=2) + "\n")
                beside = [(facts_scratch, out.with_name(out.name + ".json"))]
            difference, kind = compare(predictor, network, scratch, arguments.format)
            if not difference <= TOLERANCE:  # also catches NaN
                raise UserError(
                    f"the exported network's logits differ from the checkpoint's by {difference:.1e} of the largest "
                    f"(allowed: {TOLERANCE:.0e}); nothing was written"
                )
            for new, place in (*beside, (scratch, out)):
                new.replace(place)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror or one_line(error)}") from None
    height, width, channels = predictor.image_shape
    rows = [
        *_origin(predictor, arguments.workdir),
        ("file", f"{out}, {out.stat().st_size / 1e6:.1f} MB"),
        *[("metadata", str(place)) for _, place in beside],
        ("input", f"images uint8 [batch, {height}, {width}, {channels}], 0 to 255"),
        ("output", f"logits, probabilities float32 [batch, {len(predictor.class_names)}]"),
        ("checked", f"logits on {kind} differ by {difference:.1e} of the largest"),
    ]
    Console().table("export", rows)


def _export_weights(predictor: Predictor, arguments: argparse.Namespace, out: pathlib.Path) -> None:
    facts = metadata(predictor)
    facts["normalisation"]["in_the_graph"] = False
    with _cleared(scratch := _scratch(out, out.suffix)):
        try:
            found = weights.write_weights(predictor, scratch, facts)
            scratch.replace(out)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror or one_line(error)}") from None
    rows = [
        *_origin(predictor, arguments.workdir),
        ("file", f"{out}, {out.stat().st_size / 1e6:.1f} MB"),
        ("input", "images as in the metadata: normalised by mean and std, channels first"),
    ]
    Console().table("export", rows + found)


def _predictor(arguments: argparse.Namespace) -> Predictor:
    if names_weights(arguments):
        moved = [] if arguments.data_dir is None else [f"--config.data.dir={arguments.data_dir}"]
        return Predictor(restore_given(arguments, [*arguments.overrides, *moved]))
    configure_for(arguments.workdir)
    return Predictor.from_workdir(
        arguments.workdir, arguments.checkpoint, arguments.data_dir, weights=arguments.weights
    )


def _origin(predictor: Predictor, workdir: str | None) -> list[tuple[str, str]]:
    if workdir is None:
        return describe_weights(predictor.restored)
    return [("network", f"step {predictor.restored.step} of {workdir}")]


def inference_network(predictor: Predictor) -> Network:
    """Returns a function from uint8 images `[B, H, W, C]` to float32 logits and probabilities, weights included."""
    experiment = predictor.restored.experiment
    data, model = experiment.config.data, experiment.model.clone(dtype=jnp.float32)
    variables = jax.tree.map(np.asarray, jax.device_get(predictor.variables))

    def network(images: jax.Array) -> dict[str, jax.Array]:
        logits = apply_network(model, data, variables, images)
        return {"logits": logits, "probabilities": jax.nn.softmax(logits)}

    return network


def metadata(predictor: Predictor) -> dict[str, Any]:
    """Returns the metadata that a user of the file needs: class names, preprocessing of images, and origin."""
    config = predictor.restored.experiment.config
    height, width, channels = predictor.image_shape
    crops = config.data.augmentation == "imagenet"
    return {
        "class_names": list(predictor.class_names),
        "preprocessing": {
            "height": height,
            "width": width,
            "channels": {1: "grey", 3: "RGB"}.get(channels, channels),
            # Resize the short side to this length and crop the centre; null: resize the whole image to height x width.
            "short_side": round(height / config.data.eval_crop_fraction) if crops else None,
            "crop_fraction": config.data.eval_crop_fraction if crops else None,
        },
        "normalisation": {"in_the_graph": True, "mean": list(config.data.mean), "std": list(config.data.std)},
        "source": {
            "model": config.model.name,
            "attention": config.model.attention,
            "data": config.data.name,
            "step": predictor.restored.step,
            "hga_flax": __version__,
        },
    }


def compare(predictor: Predictor, network: Network, file: pathlib.Path, form: str) -> tuple[float, str]:
    """Compares the file with the network on the images of `check_images`.

    The images are run as one batch, and the first one again as a batch of one.

    Returns:
        The largest difference of a logit, relative to the largest logit unless that is zero, and the description of
        the images.
    """
    images, kind = check_images(predictor)
    with jax.default_device(_cpu()):  # other devices round float32 products too coarsely for this comparison
        expected = np.asarray(jax.jit(network)(images)["logits"])
        served = _session(file) if form == "onnx" else load(file.read_bytes())
        found = np.concatenate([np.asarray(served(part)["logits"]) for part in (images, images[:1])])
    expected = np.concatenate([expected, expected[:1]])
    largest = abs(expected).max() or 1.0  # a classifier that starts at zero has zero logits
    return float(abs(found - expected).max() / largest), kind


def check_images(predictor: Predictor) -> tuple[np.ndarray, str]:
    """Returns uint8 images `[CHECKED, H, W, C]` of the evaluation split, or synthetic ones, and their description."""
    dataset, config = predictor.restored.experiment.dataset, predictor.restored.experiment.config
    images = []
    with contextlib.suppress(UserError):  # the data set may not be on this machine
        source = dataset.open(config.data.eval_split)
        for index in range(min(4 * CHECKED, len(source))):
            with contextlib.suppress(BadImage):
                images.append(predictor.load(source[index]["image"]))
    if images:
        real = "synthetic images (data.fake)" if config.data.fake else f"images of '{config.data.eval_split}'"
        some = min(len(images), CHECKED)
        return np.stack([images[i % len(images)] for i in range(CHECKED)]), f"{some} {real}"
    shape = CHECKED, *predictor.image_shape
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return noise, f"{CHECKED} synthetic images (the data set is not available)"


def _session(file: pathlib.Path) -> Network:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format=onnx needs packages that are not installed: pip install {' '.join(missing)}")


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return jax.local_devices()[0]


def _scratch(out: pathlib.Path, suffix: str = "") -> pathlib.Path:
    """Returns a file beside `out`; its name is short, because that of `out` may be as long as a name can be."""
    return out.with_name(f".export-{os.getpid()}{suffix}")


@contextlib.contextmanager
def _cleared(file: pathlib.Path) -> Iterator[None]:
    """Deletes a scratch file on exit, even after an error."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
