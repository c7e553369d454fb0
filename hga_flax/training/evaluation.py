"""Evaluates a state on a whole split; every example counts exactly once."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hga_flax.images.device_augmentation import normalize
from hga_flax.platforms import programs_for
from hga_flax.processes.mesh import replicate, to_devices
from hga_flax.training.metrics import ClassificationMetrics, read

EvalStep = Callable[[Any, Any, ClassificationMetrics, dict[str, jax.Array]], ClassificationMetrics]


def normalized(images: jax.Array, data: ConfigDict) -> jax.Array:
    """Returns raw images `[B, H, W, C]` (values 0..255) normalised for the network, float32.

    Args:
        images: uint8 or float32.
        data: the group `data` of a configuration, for its mean and standard deviation.
    """
    return normalize(images, data.mean, data.std)


def apply_network(model: nn.Module, data: ConfigDict, variables: Any, images: jax.Array) -> jax.Array:
    """Normalises raw images and applies a trained network; used by evaluation, prediction and export.

    Args:
        model: the network.
        data: the group `data` of the configuration that it was trained with.
        variables: `{"params", "batch_stats"}`.
        images: uint8 or float32 `[B, H, W, C]`, values 0..255.

    Returns:
        Logits `[B, num_classes]`.
    """
    return model.apply(variables, normalized(images, data), train=False)


def no_images(split: str) -> str:
    """Returns the message for a split that has no readable image."""
    return f"none of the images of the split '{split}' can be read; repair them, or choose another split"


def evaluate(
    eval_step: EvalStep,
    params: Any,
    batch_stats: Any,
    batches: Iterator[dict[str, np.ndarray]],
    mesh: Mesh,
    stop: Callable[[], int] = lambda: 0,
) -> dict[str, float] | None:
    """Runs the evaluation step over all batches.

    Args:
        eval_step: compiled step from `make_eval_step`.
        params: parameters of the network.
        batch_stats: batch statistics of the network.
        batches: batches from `Dataset.eval_batches`.
        mesh: device mesh.
        stop: called after each batch; a result above 0 cancels the evaluation.

    Returns:
        `loss` (nats), `top1_error` (percent), with more than five classes `top5_error` (percent), and
        `num_examples`; None if cancelled.
    """
    sums = replicate(ClassificationMetrics.empty(), mesh)
    for batch in to_devices(batches, mesh):
        behind = sums
        with programs_for(mesh.devices.flat[0]):
            sums = eval_step(params, batch_stats, sums, batch)
        jax.block_until_ready(behind)  # one batch running, one queued: bounds memory and the delay of a stop
        if stop():
            return None
    return read(sums) | {"num_examples": int(sums.loss.count)}
