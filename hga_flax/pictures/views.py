"""Runs trained networks on images and collects classes, Grad-CAM maps and gates for drawing."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hga_flax.errors import UserError, nearest
from hga_flax.images.bad_images import BadImage
from hga_flax.images.host_augmentation import host_transform
from hga_flax.pictures.gates import BlockGates, read_gates
from hga_flax.pictures.gradcam import look
from hga_flax.training.evaluation import normalized
from hga_flax.training.restore import Restored, configure_for, restore_workdir


@dataclasses.dataclass(frozen=True)
class View:
    """Results of one run on B images.

    Attributes:
        label: name of the run's attention, or of its folder if several runs have the same attention.
        workdir: the run's folder.
        images: uint8 `[B, H, W, C]`, the network's input before normalisation.
        titles: explained class and its probability for each image.
        cams: Grad-CAM maps `[B, h, w]`.
        blocks: gates of each block; empty for attentions without gates.
    """

    label: str
    workdir: str
    images: np.ndarray
    titles: list[str]
    cams: np.ndarray
    blocks: list[BlockGates]


def explain(
    path: str, checkpoint: str, encoded: Sequence[tuple[str, bytes]], wanted: str | None, weights: str | None = None
) -> View:
    """Restores a run and explains one class for each image.

    Args:
        path: the workdir.
        checkpoint: "best", "latest" or a step.
        encoded: (name, content) of each image file.
        wanted: name or index of the class; None explains the predicted class.
        weights: "ema" or "raw"; None uses the moving average if the run keeps one.

    Raises:
        UserError: the run or an image cannot be used, or there is no such class.
    """
    configure_for(path)
    return explain_restored(restore_workdir(path, checkpoint, weights=weights), path, encoded, wanted)


def explain_restored(restored: Restored, path: str, encoded: Sequence[tuple[str, bytes]], wanted: str | None) -> View:
    """Explains one class for each image with a restored network; like `explain`, with `path` only for messages."""
    experiment, variables = restored.experiment, jax.device_get(restored.variables)
    config, info = experiment.config, experiment.dataset.info
    chosen = None if wanted is None else find_class(wanted, info.class_names, info.num_classes, path)
    images = preprocess(encoded, config, info.channels)
    classes = None if chosen is None else np.full(len(images), chosen)
    seen = look(experiment.model, variables, normalized(images, config.data), classes)
    titles = class_titles(seen.logits, seen.classes, info.class_names)
    blocks = read_gates(experiment.model, variables, seen.intermediates)
    return View(config.model.attention, path, images, titles, seen.cams, blocks)


def preprocess(encoded: Sequence[tuple[str, bytes]], config: Any, channels: int) -> np.ndarray:
    """Decodes and crops images as evaluation does: uint8 `[B, size, size, channels]`.

    Raises:
        UserError: the bytes are not an image; the message gives its name.
    """
    transform = host_transform(config.data, channels, train=False, seed=config.seed, size=config.evaluation.image_size)
    images = []
    for name, image in encoded:
        try:
            images.append(transform(image, 0, 0))
        except BadImage as error:
            raise UserError(f"{name}: {error}") from None
    return np.stack(images)


def find_class(wanted: str, names: Sequence[str], count: int, path: str) -> int:
    """Returns the index of the class named `wanted`; if there is none, reads `wanted` as an index.

    Raises:
        UserError: there is no such class.
    """
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < count:
        return int(wanted)
    hint = nearest(wanted, names)
    raise UserError(f"--class={wanted}: {path} has no such class{hint}; give a name, or an index up to {count - 1}")


def class_titles(logits: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> list[str]:
    """Returns "name (99 %)" for each image, with a second line if a different class was predicted."""
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares = exact / exact.sum(axis=-1, keepdims=True)
    name = lambda index: names[index] if index < len(names) else str(index)
    titles = []
    for row, chosen in zip(shares, classes, strict=True):
        title = f"{name(chosen)} ({percent(row[chosen])})"
        if row.argmax() != chosen:
            title += f"\npredicted {name(row.argmax())} ({percent(row.max())})"
        titles.append(title)
    return titles


def percent(share: float) -> str:
    """Returns a share in percent, with one decimal place near 0 and 100 %."""
    decimals = 1 if 0.0005 <= share < 0.01 or 0.99 < share < 0.9995 else 0
    return f"{100 * share:.{decimals}f} %"


def with_labels(views: Sequence[View]) -> list[View]:
    """Returns the views with distinct labels: attentions, else folder names, else paths."""
    for label in (lambda view: view.label, lambda view: pathlib.Path(view.workdir).name, lambda view: view.workdir):
        labels = [label(view) for view in views]
        if len(set(labels)) == len(views):
            break
    return [dataclasses.replace(view, label=label) for view, label in zip(views, labels, strict=True)]
