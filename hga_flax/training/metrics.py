"""Loss, top-1 and top-5 error as clu metrics: sums and counts that are averaged only when read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jax import lax

from hga_flax.platforms import by_platform, on_gpus

TOP = 5  # k of the top-5 error, which is meaningless for at most this many classes


@flax.struct.dataclass
class ClassificationMetrics(metrics.Collection):
    """`loss` (cross-entropy, nats), `top1_error` and `top5_error` (fractions), without masked examples."""

    loss: metrics.Average.from_output("loss")
    top1_error: metrics.Average.from_output("top1_error")
    top5_error: metrics.Average.from_output("top5_error")


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """The same metrics of training steps, and `gradient_norm`: norm of the whole gradient before clipping."""

    # clu finds a collection's metrics only in the class itself, not in its base classes.
    loss: metrics.Average.from_output("loss")
    top1_error: metrics.Average.from_output("top1_error")
    top5_error: metrics.Average.from_output("top5_error")
    gradient_norm: metrics.Average.from_output("gradient_norm")


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Returns the cross-entropy of each example: `[B, classes]`, int `[B]` -> float32 `[B]`."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = _picked(log_p, labels)
    return -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(axis=-1)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Returns each example's binary cross-entropy, averaged over classes: `[B, classes]`, int `[B]` -> float32 `[B]`.

    As in timm (Wightman et al., https://arxiv.org/abs/2110.00476, section 2.3), label smoothing is spread over all
    classes.
    """
    logits = logits.astype(jnp.float32)
    picked = _picked(logits, labels)
    classes = logits.shape[-1]
    targeted = (1 - label_smoothing) * picked / classes + label_smoothing / classes * logits.mean(axis=-1)
    return jax.nn.softplus(logits).mean(axis=-1) - targeted


def _picked(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns each row's value at its label: `[B, classes]`, int `[B]` -> `[B]`; NaN if the label is out of range.

    On GPUs it uses a mask: the gradient of a gather is a scatter, which needs a sort there to be deterministic.
    """

    def by_index(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]

    def by_mask(values: jax.Array) -> jax.Array:
        classes = values.shape[-1]
        picked = jnp.where(labels[:, None] == jnp.arange(classes), values, 0).sum(axis=-1)
        return jnp.where((labels >= 0) & (labels < classes), picked, jnp.nan)

    return by_platform(by_index, values, **on_gpus(by_mask))


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def top_k_errors(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns 1 if the label's logit is not among the k largest, else 0: float32 `[B]`.

    Ties count as errors, because the order among equal logits is arbitrary.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # NaN compares false with everything: counting `logits > own` would give a diverged network no errors.
    rank = (~(logits < own)).sum(axis=-1) - 1
    return jnp.where(rank < k, 0.0, 1.0)


def batch_metrics(
    logits: jax.Array, labels: jax.Array, loss: jax.Array, mask: jax.Array | None, axis_name: str
) -> ClassificationMetrics:
    """Returns the metrics of the global batch: each device's part, summed over `axis_name`."""
    local = ClassificationMetrics.single_from_model_output(
        loss=loss,
        top1_error=top_k_errors(logits, labels, 1),
        top5_error=top_k_errors(logits, labels, TOP),
        mask=jnp.ones_like(labels, bool) if mask is None else mask,
    )
    if logits.shape[-1] <= TOP:  # the label is always in the top 5: count nothing, so that `read` leaves it out
        local = local.replace(top5_error=jax.tree.map(lambda leaf: 0 * leaf, local.top5_error))
    return lax.psum(local, axis_name)


def read(collection: ClassificationMetrics | TrainMetrics) -> dict[str, float]:
    """Waits for the device and returns the averages by name, errors in percent.

    There is no `top5_error` for at most five classes. Divides in float64: 31 of 100 are 31 %, not 31.000000238.
    """
    sums = {f.name: getattr(collection, f.name) for f in dataclasses.fields(collection)}
    averages = {name: value for name, value in sums.items() if isinstance(value, metrics.Average)}
    if collection.loss.count and not collection.top5_error.count:
        del averages["top5_error"]
    with np.errstate(invalid="ignore"):  # the average of nothing is NaN
        return {
            name: float(np.float64(value.total) * (100 if name.endswith("_error") else 1) / np.float64(value.count))
            for name, value in averages.items()
        }


def best_of(num_classes: int) -> list[str]:
    """Returns the names of the evaluation metrics that TensorBoard shows as the results of a run's hyperparameters."""
    return ["top1_error", *(["top5_error"] if num_classes > TOP else []), "loss"]


def top5_text(values: Mapping[str, float | None], before: str) -> str:
    """Returns the top-5 error as "`before` 1.23 %", or "" if there is none."""
    return f"{before} {values['top5_error']:.2f} %" if "top5_error" in values else ""


def all_finite(tree: Any) -> bool:
    """Returns True if no leaf of the tree holds a NaN or an infinity.

    Runs on the host, where a checkpoint copies the tree anyway, so that nothing is compiled during a grace period.
    """
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))
