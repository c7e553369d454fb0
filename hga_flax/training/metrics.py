"""Loss, top-1 and top-5 error as clu metrics: sums and counts, averaged only when they are read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jax import lax

from hga_flax.attention.platforms import by_platform, on_gpus

TOP = 5  # of "top-5 error", which says nothing of so many classes or fewer


@flax.struct.dataclass
class ClassificationMetrics(metrics.Collection):
    """`loss` (cross-entropy, nats), `top1_error` and `top5_error` (shares); masked examples do not count."""

    loss: metrics.Average.from_output("loss")
    top1_error: metrics.Average.from_output("top1_error")
    top5_error: metrics.Average.from_output("top5_error")


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """The same of training steps, and `gradient_norm`: of the whole gradient, before it is clipped."""

    # clu looks for a collection's metrics in the class itself, not in those that it inherits from.
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
    """Returns the mean over the classes of each one's binary cross-entropy: `[B, classes]`, int `[B]` -> float32 `[B]`.

    As timm's (Wightman et al., https://arxiv.org/abs/2110.00476, section 2.3): the share of the smoothing is spread
    over all classes.
    """
    logits = logits.astype(jnp.float32)
    picked = _picked(logits, labels)
    classes = logits.shape[-1]
    targeted = (1 - label_smoothing) * picked / classes + label_smoothing / classes * logits.mean(axis=-1)
    return jax.nn.softplus(logits).mean(axis=-1) - targeted


def _picked(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns each row's value of its label: `[B, classes]`, int `[B]` -> `[B]`; NaN where there is no such class.

    The gradient of a gather is a scatter, which on GPUs comes with a sort where it must be deterministic: they mask.
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
    """Returns 1 where the label's logit is not among the k largest, else 0: float32 `[B]`.

    Ties count against the network, as they do where the order among equals is not known.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # NaN compares false with everything: without this a diverged network would make no errors.
    rank = (~(logits < own)).sum(axis=-1) - 1
    return jnp.where(rank < k, 0.0, 1.0)


def batch_metrics(
    logits: jax.Array, labels: jax.Array, loss: jax.Array, mask: jax.Array | None, axis_name: str
) -> ClassificationMetrics:
    """Returns the metrics of the global batch, from each device's part and a sum over `axis_name`."""
    local = ClassificationMetrics.single_from_model_output(
        loss=loss,
        top1_error=top_k_errors(logits, labels, 1),
        top5_error=top_k_errors(logits, labels, TOP),
        mask=jnp.ones_like(labels, bool) if mask is None else mask,
    )
    if logits.shape[-1] <= TOP:  # the right class is always among them: nothing is counted, and `read` leaves it out
        local = local.replace(top5_error=jax.tree.map(lambda leaf: 0 * leaf, local.top5_error))
    return lax.psum(local, axis_name)


def read(collection: ClassificationMetrics | TrainMetrics) -> dict[str, float]:
    """Waits for the device and returns the averages by name, errors in percent; no top-5 error of so few classes.

    Divides in float64: 31 of 100 are 31 %, not 31.000000238.
    """
    sums = {f.name: getattr(collection, f.name) for f in dataclasses.fields(collection)}
    averages = {name: value for name, value in sums.items() if isinstance(value, metrics.Average)}
    if collection.loss.count and not collection.top5_error.count:
        del averages["top5_error"]
    with np.errstate(invalid="ignore"):  # of nothing: NaN
        return {
            name: float(np.float64(value.total) * (100 if name.endswith("_error") else 1) / np.float64(value.count))
            for name, value in averages.items()
        }


def best_of(num_classes: int) -> list[str]:
    """Returns the names of an evaluation's metrics of which TensorBoard shows the best."""
    return ["top1_error", *(["top5_error"] if num_classes > TOP else []), "loss"]


def top5_text(values: Mapping[str, float | None], before: str) -> str:
    """Returns "`before` 1.23 %" of the top-5 error, "" where there is none."""
    return f"{before} {values['top5_error']:.2f} %" if "top5_error" in values else ""


def all_finite(tree: Any) -> bool:
    """True where no leaf of the tree holds a NaN or an infinity.

    On the host, where a checkpoint copies the tree anyway: nothing is compiled while a signal's grace period runs out.
    """
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))
