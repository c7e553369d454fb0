"""Evaluation of a state on a whole split, every example counted exactly once."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hga_flax.training.mesh import replicate, to_devices
from hga_flax.training.metrics import ClassificationMetrics, read

EvalStep = Callable[[Any, Any, ClassificationMetrics, dict[str, jax.Array]], ClassificationMetrics]


def evaluate(
    eval_step: EvalStep, params: Any, batch_stats: Any, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, float]:
    """Runs the evaluation step over all batches.

    Returns:
        `loss` (nats), `top1_error` and `top5_error` (percent) and `num_examples`.
    """
    sums = replicate(ClassificationMetrics.empty(), mesh)
    for batch in to_devices(batches, mesh):
        sums = eval_step(params, batch_stats, sums, batch)
    return read(sums) | {"num_examples": int(sums.loss.count)}
