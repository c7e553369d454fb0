"""Weights without a run: a file of torchvision's, timm's or a public CIFAR program's, or a run's folder, made usable.

The network's options and its number of classes are read off the file; how its images are prepared is known by
the file's name (pretrained/preprocessing.py), and any `data.*` that the user gives wins. Evaluation wants the whole
network: what the file lacks, or what it has beyond the network, is an error and no fresh value.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from hga_flax.config.loading import base_config, build_model, load_config, override, parse_options
from hga_flax.config.rules import check_keys
from hga_flax.data.classes import difference
from hga_flax.data.imagenet import imagenet_classes
from hga_flax.data.sources import FOLDER, DatasetInfo, dataset_info
from hga_flax.errors import ConfigError, UserError
from hga_flax.pretrained.cifar_weights import is_cifar
from hga_flax.pretrained.peers import ATTENTION_OPTIONS, PEERS
from hga_flax.pretrained.preprocessing import Preprocessing, preprocessing_of
from hga_flax.processes.mesh import create_mesh
from hga_flax.processes.settings import configure_process
from hga_flax.runs import workdir as files
from hga_flax.training.experiment import create_experiment
from hga_flax.training.initial_weights import HEAD, Path, Source, fit, locate, read_weights
from hga_flax.training.metrics import TrainMetrics
from hga_flax.training.restore import Restored
from hga_flax.training.state import TrainState

KEY = "--weights"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PREPARED = ("mean", "std", "image_size", "eval_crop_fraction", "augmentation")  # of `data`, by the weights


def restore_given(
    arguments: argparse.Namespace,
    overrides: Collection[str] | None = None,
    *,
    data: bool = False,
    batch_size: int | None = None,
) -> Restored:
    """Does what `restore_weights` does by a command's flags (see `add_weights_flags`), and configures the process."""
    config, overrides = arguments.config, list(arguments.overrides if overrides is None else overrides)
    with contextlib.suppress(UserError):  # `restore_weights` says what is wrong
        configure_process(override(load_config(config) if config else base_config(), overrides), train=False)
    model, attention = arguments.model or "", arguments.attention or ""
    return restore_weights(arguments.weights, model, attention, config, overrides, data=data, batch_size=batch_size)


def restore_weights(
    weights: str,
    model: str = "",
    attention: str = "",
    config: str | ConfigDict | None = None,
    overrides: Collection[str] = (),
    *,
    data: bool = False,
    batch_size: int | None = None,
) -> Restored:
    """Makes a network of a file of weights, or of a run's folder, ready for use.

    Args:
        weights: FILE, FILE@KEY, DIR, DIR@latest or DIR@STEP, see `read_weights`.
        model: the network: ours ("resnet50", "cifar_resnet20"), or a name of timm's ("seresnet50"); "" for
            the configuration's. A run has its own.
        attention: its attention; "" for the configuration's, or what the name of `model` says.
        config: a file or a configuration, configs/base.py unless given; for a run its own.
        overrides: "--config.key=value" arguments; what they say of `data` wins over what is known of the weights.
        data: use the classes of the configuration's data set, which must then be there.
        batch_size: of an evaluation, if not the configuration's (rounded up to the number of devices).

    Raises:
        UserError: the weights cannot be read or are not this network's, or their classes are not the data set's.
    """
    path, _ = locate(weights, KEY)
    is_run = path.is_dir()
    if not is_run and not model and config is None:
        raise UserError(f"{KEY}={weights}: --model=NAME is missing: the network that they belong to, such as resnet50")
    if config is None:
        config = files.read_config(path) if is_run else base_config()
    config = (load_config(config) if isinstance(config, str) else config.copy_and_resolve_references()).unlock()
    config = override(config.lock(), list(overrides)).unlock()
    given = {argument.removeprefix("--config.").split("=")[0] for argument in overrides}
    config.init.weights = ""
    if is_run:
        _take_runs(config, files.read_config(path), given)
    else:
        _name_network(config, model, attention, given)
    check_keys(config)
    source, places = _read(weights, config)
    _set_options(config, source, places, given)
    known = None if source.peer is None else preprocessing_of(source.peer, source.path)
    if known:
        _prepare_images(config, known, given)
    classes, channels = _shapes(source, config)
    info = _dataset(config, source, classes, channels, files.read_dataset(path) if is_run else None, data)
    devices = create_mesh().devices.size
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size={batch_size}: must be at least 1")
    size = batch_size or config.evaluation.batch_size or min(config.training.batch_size, 256)
    config.evaluation.batch_size = -(-size // devices) * devices
    experiment = create_experiment(config.lock(), info, train=False)
    return Restored(experiment, _state(source, config, classes, channels), 0, origin=source.origin, known=known)


def _name_network(config: ConfigDict, model: str, attention: str, given: Collection[str]) -> None:
    """Sets `config.model` by the flags; a name of timm's says the attention too."""
    if model:
        named, its_attention = PEERS.get(model, (model, ""))
        if model != config.model.name and "model.options" not in given:
            config.model.options = ""
        config.model.name = named
        if "model.attention" not in given:
            config.model.attention = its_attention or "none"
            options = ATTENTION_OPTIONS.get(model, {})
            if "model.attention_options" not in given:
                config.model.attention_options = ", ".join(f"{key}={value!r}" for key, value in options.items())
    if attention:
        config.model.attention = attention


def _take_runs(config: ConfigDict, run: ConfigDict, given: Collection[str]) -> None:
    """Takes a run's network, and how its images are prepared."""
    for key in ("name", "options", "attention", "attention_options"):
        config.model[key] = run.model[key]
    for key in PREPARED:
        if f"data.{key}" not in given:
            config.data[key] = run.data[key]
    config.evaluation.image_size = run.evaluation.image_size


def _prepare_images(config: ConfigDict, known: Preprocessing, given: Collection[str]) -> None:
    values = {
        "mean": known.mean,
        "std": known.std,
        "image_size": known.image_size,
        "augmentation": "imagenet" if known.crop_fraction else "none",
    }
    if known.crop_fraction:
        values["eval_crop_fraction"] = known.crop_fraction
    for key, value in values.items():
        if f"data.{key}" not in given:
            config.data[key] = value
    if "evaluation.image_size" not in given:
        config.evaluation.image_size = 0


def _read(weights: str, config: ConfigDict) -> tuple[Source, dict[Path, Any]]:
    """Reads the weights for the network as it is configured."""
    places = _places(config, 1, 3)
    return read_weights(weights, config.model.name, places, KEY), places


def _places(config: ConfigDict, classes: int, channels: int) -> dict[Path, Any]:
    model = build_model(config, classes)
    size = max(config.data.image_size, model.stride)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, channels))))
    return flatten_dict({"params": variables["params"], "batch_stats": variables.get("batch_stats", {})})


def _set_options(config: ConfigDict, source: Source, places: dict[Path, Any], given: Collection[str]) -> None:
    """Sets the shortcuts of a CIFAR network whose file has none with parameters."""
    has = lambda paths: any("downsample_conv" in path for path in paths)
    if is_cifar(source.peer) and has(places) and not has(source.arrays) and "model.options" not in given:
        options = parse_options(config.model.options, "model.options") | {"shortcut": "A"}
        config.model.options = ", ".join(f"{key}={value!r}" for key, value in options.items())


def _shapes(source: Source, config: ConfigDict) -> tuple[int, int]:
    """Returns the number of classes and of input channels that the arrays have."""
    head = next((array for path, array in source.arrays.items() if path[1:3] == (HEAD, "kernel")), None)
    stem = next((a for path, a in source.arrays.items() if path[1].startswith("stem") and a.ndim == 4), None)
    if head is None:
        raise UserError(
            f"{KEY}={source.origin}: it has no last layer, so that it names no classes; train one: "
            f"train.py --config.init.weights=FILE"
        )
    return head.shape[-1], stem.shape[2] if stem is not None else 3


def _dataset(
    config: ConfigDict, source: Source, classes: int, channels: int, of_run: DatasetInfo | None, data: bool
) -> DatasetInfo:
    """Returns the classes: the data set's, the run's, or those that such weights are known to have.

    Raises:
        UserError: the data set has other classes than the weights.
    """
    names: tuple[str, ...] = ()
    if of_run:
        names = of_run.class_names
    elif source.peer in PEERS and classes == 1000:
        names = imagenet_classes()
    elif is_cifar(source.peer) and classes == 10:
        names = CIFAR10
    if not data:
        return DatasetInfo(config.data.name, classes, channels, names)
    if of_run and config.data.name == FOLDER:
        return dataclasses.replace(of_run, name=FOLDER, num_examples={})  # whose classes are compared as it is opened
    info = dataset_info(config.data.name, config.data.dir)
    if info.num_classes != classes:
        raise UserError(
            f"{KEY}={source.origin}: the weights tell {classes:,} classes apart, {config.data.name} has "
            f"{info.num_classes:,}; give data with the classes of the weights, or fine-tune: train.py "
            "--config.init.weights=FILE"
        )
    if of_run and (differs := difference(of_run.class_names, info.class_names, config.data.name)):
        raise UserError(f"{KEY}={source.origin}: {differs}")
    return info


def _state(source: Source, config: ConfigDict, classes: int, channels: int) -> TrainState:
    """Returns a state with the weights in it, and nothing of training.

    Raises:
        UserError: arrays are missing, or the file has some for which the network has no place.
    """
    network = f"{config.model.name} with attention {config.model.attention}"
    fitted = fit(source, _places(config, classes, channels), network)
    heads = [name for name in fitted.unused if name.startswith(("auxiliary", "aux"))]
    unused = [name for name in fitted.unused if name not in heads]
    for what, names in (("it lacks", fitted.fresh), ("the network has no place for", unused)):
        if names:
            listed = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
            raise UserError(
                f"{KEY}={source.origin}: these are not the weights of {network}: {what} {listed}; set --model, "
                "--attention and --config.model.options to the network that they belong to"
            )
    variables = unflatten_dict(dict(fitted.loaded))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=(),
        metrics=TrainMetrics.empty(),
        skipped=jnp.zeros((), jnp.int32),
    )


def describe_weights(restored: Restored) -> list[tuple[str, str]]:
    """Returns what a command prints of weights without a run: (name, value) rows."""
    config = restored.experiment.config
    data, size = config.data, restored.experiment.eval_image_shape[0]
    if data.augmentation == "imagenet":
        images = f"{size} pixels, the centre of a short side of {round(size / data.eval_crop_fraction)}"
    else:
        images = f"{size} pixels, the whole image"
    rows = [
        ("weights", restored.origin),
        ("model", f"{config.model.name}, attention {config.model.attention}"),
        ("images", images),
        ("mean, std", f"{_numbers(data.mean)}; {_numbers(data.std)}"),
    ]
    if restored.known:
        known = restored.known
        rows.append(("known by", f"{known.known} (interpolation there: {known.interpolation}; here: by area)"))
    return rows


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
