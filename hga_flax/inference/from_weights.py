"""Restores a network from weights: a file from torchvision, timm or a public CIFAR program, or a run's folder.

The file determines the network's options and number of classes. Its name determines the preprocessing of images
(pretrained/preprocessing.py), unless the user sets `data.*`. Evaluation needs the whole network: an array missing
on either side is an error, and is never replaced by an initial value.
"""

import argparse
import contextlib
import dataclasses
import os
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from hga_flax.config.checks import check_given, check_keys, get_key
from hga_flax.config.loading import base_config, build_model, load_config, overridden, override, parse_options
from hga_flax.data.classes import difference
from hga_flax.data.imagenet import imagenet_classes
from hga_flax.data.sources import FOLDER, DatasetInfo, dataset_info
from hga_flax.errors import ConfigError, UserError
from hga_flax.inference.exported import Exported, read_exported
from hga_flax.pretrained.cifar_weights import is_cifar
from hga_flax.pretrained.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TRANSFORM_INPUT,
    Preprocessing,
    preprocessing_of,
)
from hga_flax.pretrained.torch_names import ATTENTION_OPTIONS, PEERS
from hga_flax.processes.mesh import create_mesh
from hga_flax.processes.settings import configure_process
from hga_flax.runs import workdir as files
from hga_flax.training.experiment import create_experiment
from hga_flax.training.initial_weights import HEAD, fit, is_stem
from hga_flax.training.metrics import TrainMetrics
from hga_flax.training.restore import Restored, warn
from hga_flax.training.state import TrainState
from hga_flax.training.weights_source import Path, Source, locate, read_weights

KEY = "--weights"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WORDNET = re.compile(r"n\d{8}")  # names of ImageNet's folders
# Keys that only training reads, by their beginnings, and those among them that evaluation reads too.
TRAINS = ("training.", "optimizer.", "schedule.", "checkpoint.", "init.", "evaluation.every_epochs", "data.flip")
TRAINS += tuple(f"data.{name}" for name in ("alternating_flip", "rotation_degrees", "crop_padding", "random_erasing"))
TRAINS += tuple(f"data.{name}" for name in ("randaugment", "mixup", "cutmix"))
EVALUATES = {"training.batch_size", "training.cpu_devices", "training.deterministic", "training.compilation_cache"}
EVALUATES |= {"training.lost_process_seconds"}
PREPARED = ("mean", "std", "image_size", "eval_crop_fraction", "augmentation")  # keys of `data` set by the weights


def restore_given(
    arguments: argparse.Namespace,
    overrides: Collection[str] | None = None,
    *,
    data: bool = False,
    batch_size: int | None = None,
) -> Restored:
    """Configures the process and calls `restore_weights` with a command's flags (see `add_weights_flags`)."""
    config, overrides = arguments.config, list(arguments.overrides if overrides is None else overrides)
    with contextlib.suppress(UserError):  # `restore_weights` reports the error
        configure_process(override(load_config(config) if config else base_config(), overrides), train=False)
    model, attention = arguments.model or "", arguments.attention or ""
    return restore_weights(arguments.weights, model, attention, config, overrides, data=data, batch_size=batch_size)


def restore_weights(
    weights: str | os.PathLike[str],
    model: str = "",
    attention: str = "",
    config: str | os.PathLike[str] | ConfigDict | None = None,
    overrides: Collection[str] = (),
    *,
    data: bool = False,
    batch_size: int | None = None,
) -> Restored:
    """Restores a network from a file of weights or a run's folder.

    Args:
        weights: FILE, FILE@KEY, DIR, DIR@latest or DIR@STEP, see `read_weights`.
        model: our name of the network ("resnet50", "cifar_resnet20") or timm's ("seresnet50"); "" for the
            configured one, or for a run.
        attention: attention of the network; "" for the one that `model` implies, or the configured one, or for a run.
        config: file or configuration; default: configs/base.py, or the run's configuration.
        overrides: "--config.key=value" arguments; their `data` keys take precedence over the known preprocessing.
        data: use the classes of the configured data set, which must then be available.
        batch_size: batch size of evaluation, rounded up to a multiple of the number of devices; None for the
            configured one.

    Raises:
        UserError: the weights cannot be read or belong to another network, the data set has other classes, or a
            network is named for a run.
    """
    weights = os.fspath(weights)
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    path, _ = locate(weights, KEY)
    is_run = path.is_dir()
    if not is_run and not model and config is None:
        raise UserError(f"{KEY}={weights}: --model=NAME is missing; name the weights' network, such as resnet50")
    if config is None:
        config = files.read_config(path) if is_run else base_config()
    config = config.copy_and_resolve_references() if isinstance(config, ConfigDict) else load_config(os.fspath(config))
    config = override(config.lock(), overrides).unlock()
    given = {overridden(argument) for argument in overrides}
    config.init.weights = ""
    if is_run:
        own = [f"--{name}" for name, value in (("model", model), ("attention", attention)) if value]
        own += [f"--config.{key}" for key in sorted(given) if key.startswith("model.")]
        if own:
            raise UserError(f"{own[0]}: only for {KEY}=FILE; the run in {weights} has its own network")
        _take_runs(config, files.read_config(path), given)
    else:
        _name_network(config, model, attention, given)
    exported = None if is_run else read_exported(path)
    if exported:
        _take_options(config, exported, given)
    check_keys(config)
    places = _places(config, 1, 3)
    source = read_weights(weights, config.model.name, places, KEY)
    _set_options(config, source, places, given)
    known = None if source.peer is None else preprocessing_of(source.peer, source.path)
    if exported:
        known = exported.preprocessing
    if known == TRANSFORM_INPUT and parse_options(config.model.options, "config.model.options").get("transform_input"):
        known = dataclasses.replace(known, mean=IMAGENET_MEAN, std=IMAGENET_STD)  # the network does the rest itself
    if known:
        _prepare_images(config, known, given)
    classes, channels = _shapes(source, config)
    own_names = exported.class_names if exported else None
    info = _dataset(config, source, classes, channels, files.read_dataset(path) if is_run else None, data, own_names)
    devices = create_mesh().devices.size
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size={batch_size}: must be at least 1")
    _check_normalisation(config, source, channels)
    size = batch_size or config.evaluation.batch_size or min(config.training.batch_size, 256)
    config.evaluation.batch_size = -(-size // devices) * devices
    _check_given(config, given)
    experiment = create_experiment(config.lock(), info, train=False)
    step = exported.step if exported else source.step
    state = _state(source, config, classes, channels, step or 0)
    return Restored(experiment, state, step, source.weights, source.origin, known)


def _check_given(config: ConfigDict, given: Collection[str]) -> None:
    """Raises a ConfigError if a key given on the command line has no effect here."""
    for key in sorted(given):
        if key.startswith(TRAINS) and key not in EVALUATES:
            value = get_key(config, key)
            raise ConfigError(f"--config.{key}={value}: has no effect with {KEY}, which is evaluated and not trained")
    check_given(config, sorted(given))


def _take_options(config: ConfigDict, exported: Exported, given: Collection[str]) -> None:
    """Sets the options of the network in the file: some change what it computes, but no array's shape."""
    if (config.model.name, config.model.attention) != exported.network:
        return
    for key, name in (("model.options", "model_options"), ("model.attention_options", "attention_options")):
        if key not in given and name in exported.options:
            values = exported.options[name]
            config.model[key.split(".")[1]] = ", ".join(f"{option}={value!r}" for option, value in values.items())


def _name_network(config: ConfigDict, model: str, attention: str, given: Collection[str]) -> None:
    """Sets `config.model` from the flags; a timm name also determines the attention.

    Options are kept if the flags name the network and the attention that are configured already.
    """
    before = config.model.name, config.model.attention
    if model:
        named, its_attention = PEERS.get(model, (model, ""))
        if model != config.model.name and "model.options" not in given:
            config.model.options = ""
        config.model.name = named
        if "model.attention" not in given:
            config.model.attention = its_attention or "none"
    if attention:
        config.model.attention = attention
    if (config.model.name, config.model.attention) != before and "model.attention_options" not in given:
        options = {} if attention else ATTENTION_OPTIONS.get(model, {})
        config.model.attention_options = ", ".join(f"{key}={value!r}" for key, value in options.items())


def _take_runs(config: ConfigDict, run: ConfigDict, given: Collection[str]) -> None:
    """Copies the network and the preprocessing of images from a run's configuration."""
    for key in ("name", "options", "attention", "attention_options"):
        config.model[key] = run.model[key]
    for key in PREPARED:
        if f"data.{key}" not in given:
            config.data[key] = run.data[key]
    if "evaluation.image_size" not in given:
        config.evaluation.image_size = 0 if "data.image_size" in given else run.evaluation.image_size


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


def _places(config: ConfigDict, classes: int, channels: int) -> dict[Path, Any]:
    """Returns the shapes and dtypes of the configured network's variables, by path."""
    model = build_model(config, classes)
    size = max(config.data.image_size, model.stride)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, channels))))
    return flatten_dict({"params": variables["params"], "batch_stats": variables.get("batch_stats", {})})


def _set_options(config: ConfigDict, source: Source, places: dict[Path, Any], given: Collection[str]) -> None:
    """Sets shortcut='A' for a CIFAR network if the file has no shortcuts with parameters."""
    has = lambda paths: any("downsample_conv" in path for path in paths)
    if is_cifar(source.peer) and has(places) and not has(source.arrays) and "model.options" not in given:
        options = parse_options(config.model.options, "model.options") | {"shortcut": "A"}
        config.model.options = ", ".join(f"{key}={value!r}" for key, value in options.items())


def _shapes(source: Source, config: ConfigDict) -> tuple[int, int]:
    """Returns the numbers of classes and input channels, from the shapes of the arrays.

    Raises:
        UserError: there is no last layer.
    """
    head = next((array for path, array in source.arrays.items() if path[1:3] == (HEAD, "kernel")), None)
    stem = next((a for path, a in source.arrays.items() if is_stem(path) and a.ndim == 4), None)
    if head is None:
        raise UserError(
            f"{KEY}={source.origin}: it has no classification layer, so it predicts no classes; train one: "
            f"train.py --config.init.weights=FILE"
        )
    return head.shape[-1], stem.shape[2] if stem is not None else 3


def _check_normalisation(config: ConfigDict, source: Source, channels: int) -> None:
    """Raises a UserError if the mean or standard deviation is for another number of channels than the weights'."""
    wrong = [f"data.{key}={config.data[key]}" for key in ("mean", "std") if len(config.data[key]) not in (1, channels)]
    if wrong:
        count, numbers = (
            (f"{channels} channels", f"one number or {channels}") if channels > 1 else ("1 channel", "one number")
        )
        raise UserError(
            f"{KEY}={source.origin}: the weights take images with {count}, unlike {' and '.join(wrong)}; "
            f"give those that they were trained with, {numbers} each: --config.data.mean=... --config.data.std=..."
        )


def _dataset(
    config: ConfigDict,
    source: Source,
    classes: int,
    channels: int,
    of_run: DatasetInfo | None,
    data: bool,
    exported: tuple[str, ...] | None = None,
) -> DatasetInfo:
    """Returns the data set's description, with its own classes, the run's, or those known for the weights.

    Raises:
        UserError: the classes of the data set differ from those of the weights.
    """
    names: tuple[str, ...] = ()
    if of_run:
        names = of_run.class_names
    elif exported is not None:
        names = exported
    elif source.peer in PEERS and classes == 1000:
        names = imagenet_classes()
    elif is_cifar(source.peer) and classes == 10:
        names = CIFAR10
    if not data:
        return DatasetInfo(config.data.name, classes, channels, names)
    if of_run and config.data.name == FOLDER:
        # Opening it will compare the classes.
        return dataclasses.replace(of_run, name=FOLDER, num_examples={}, digests={})
    info = dataset_info(config.data.name, config.data.dir)
    if info.num_classes != classes:
        raise UserError(
            f"{KEY}={source.origin}: the weights have {classes:,} classes, but {config.data.name} has "
            f"{info.num_classes:,}; give data with the classes of the weights, or fine-tune: train.py "
            "--config.init.weights=FILE"
        )
    differs = difference(names, info.class_names, config.data.name)
    # The data may have other names for the same classes, as ImageNet's folders have. Some names in common are no
    # such case: in the order of the alphabet one other name moves the labels of those between.
    if differs and (of_run or (names and set(names) & set(info.class_names))):
        raise UserError(f"{KEY}={source.origin}: {differs if of_run else differs.replace('the run', 'the weights')}")
    if names and info.class_names and differs and not all(WORDNET.fullmatch(name) for name in info.class_names):
        pairs = ", ".join(f"'{a}' is '{b}'" for a, b in list(zip(info.class_names, names, strict=True))[:3])
        warn(
            f"warning: {config.data.name} has other class names than the weights, taken in this order: {pairs}"
            + (", ..." if classes > 3 else "")
        )
    if info.channels != channels:
        raise UserError(
            f"{KEY}={source.origin}: the weights take images with {channels} channels, but those of "
            f"{config.data.name} have {info.channels}; give other data, or fine-tune: train.py "
            "--config.init.weights=FILE"
        )
    return info


def _state(source: Source, config: ConfigDict, classes: int, channels: int, step: int) -> TrainState:
    """Returns a state with the weights, and without an optimizer state.

    Raises:
        UserError: arrays are missing from the file, or it has arrays that the network lacks.
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
        step=jnp.asarray(step, jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=(),
        metrics=TrainMetrics.empty(),
        skipped=jnp.zeros((), jnp.int32),
    )


def describe_weights(restored: Restored) -> list[tuple[str, str]]:
    """Returns the (name, value) rows that a command prints about weights without a run."""
    config = restored.experiment.config
    data, size = config.data, restored.experiment.eval_image_shape[0]
    if data.augmentation == "imagenet":
        images = f"{size} pixels, the centre after resizing the short side to {round(size / data.eval_crop_fraction)}"
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
