import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec

from hga_flax.training.metrics import (
    ClassificationMetrics,
    all_finite,
    batch_metrics,
    binary_cross_entropy,
    cross_entropy,
    read,
    top_k_errors,
)
from tests.training import tiny

LOGITS = np.random.RandomState(0).standard_normal((40, 12))
LABELS = np.random.RandomState(1).randint(0, 12, 40)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_against_float64(smoothing):
    target = (1 - smoothing) * np.eye(12)[LABELS] + smoothing / 12
    expected = -(target * scipy.special.log_softmax(LOGITS, axis=-1)).sum(axis=-1)
    ours = cross_entropy(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS), smoothing)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_against_float64(smoothing):
    target = (1 - smoothing) * np.eye(12)[LABELS] + smoothing / 12
    logits = LOGITS * 20  # where a naive formula would give infinities in float32
    log_p, log_not = scipy.special.log_expit(logits), scipy.special.log_expit(-logits)
    expected = -(target * log_p + (1 - target) * log_not).mean(axis=-1)
    ours = binary_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(LABELS), smoothing)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_top_k_errors_against_sorting(k):
    best = np.argsort(-LOGITS, axis=-1)[:, :k]
    expected = [0.0 if label in row else 1.0 for label, row in zip(LABELS, best, strict=True)]
    np.testing.assert_array_equal(top_k_errors(jnp.asarray(LOGITS), jnp.asarray(LABELS), k), expected)


def test_ties_and_nan_are_errors():
    logits = jnp.asarray([[1.0, 1.0, 0.0], [jnp.nan, jnp.nan, jnp.nan], [0.0, 2.0, 1.0]])
    np.testing.assert_array_equal(top_k_errors(logits, jnp.asarray([0, 0, 1]), 1), [1, 1, 0])


def test_sums_merge_exactly_and_are_read_in_percent():
    whole = np.arange(10) % 3 == 0

    def metrics(part):
        values = jnp.asarray(whole[part], jnp.float32)
        mask = jnp.ones(len(values), bool)
        return ClassificationMetrics.single_from_model_output(
            loss=values, top1_error=values, top5_error=values, mask=mask
        )

    merged = ClassificationMetrics.empty().merge(metrics(slice(0, 3))).merge(metrics(slice(3, 10)))
    assert read(merged) == pytest.approx({"loss": 0.4, "top1_error": 40.0, "top5_error": 40.0})


def test_percentages_are_those_of_whole_numbers():
    def metrics(wrong, count):
        values = jnp.arange(count) < wrong
        return ClassificationMetrics.single_from_model_output(
            loss=values, top1_error=values, top5_error=values, mask=jnp.ones(count, bool)
        )

    assert [read(metrics(n, 100))["top1_error"] for n in range(101)] == list(range(101))
    assert read(metrics(1, 3)) == {"loss": 1 / 3, "top1_error": 100 / 3, "top5_error": 100 / 3}
    assert np.isnan(list(read(ClassificationMetrics.empty()).values())).all()


def test_what_is_not_finite():
    assert all_finite({"a": jnp.ones(2), "b": jnp.zeros(())})
    assert not all_finite({"a": jnp.asarray([1.0, jnp.inf])})


@pytest.mark.medium
@pytest.mark.parametrize("classes", [2, 5, 6])
def test_of_five_classes_or_fewer_there_is_no_top_5_error(classes):
    logits, labels = jnp.asarray(LOGITS[:, :classes]), jnp.asarray(LABELS % classes)
    on = tiny.mesh(2)
    step = lambda logits, labels: batch_metrics(logits, labels, cross_entropy(logits, labels), None, "data")
    split = PartitionSpec("data")
    sums = jax.shard_map(step, mesh=on, in_specs=(split, split), out_specs=PartitionSpec())(logits, labels)
    assert set(read(sums)) == {"loss", "top1_error"} | ({"top5_error"} if classes > 5 else set())
    assert read(sums.merge(sums)) == read(sums)
