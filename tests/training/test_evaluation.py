import itertools

import flax.linen as nn
import numpy as np
import pytest

from hga_flax.data.pipeline import Shard
from hga_flax.data.sources import DatasetInfo
from hga_flax.training.evaluation import apply_network, evaluate
from hga_flax.training.experiment import create_experiment
from hga_flax.training.step import make_eval_step
from tests.training import tiny


@pytest.mark.medium
def test_the_result_does_not_depend_on_batch_size_or_devices():
    results = []
    for batch_size, devices in itertools.product((8, 24, 64), (1, 8)):
        c, on = tiny.config(data__fake_examples=37), tiny.mesh(devices)
        dataset = create_experiment(c, DatasetInfo("digits", 10, 1, ())).dataset
        model, state, _ = tiny.build(c, on)
        batches = dataset.eval_batches(dataset.source("test"), batch_size, Shard())
        results.append(evaluate(make_eval_step(model, c, on), state.params, state.batch_stats, batches, on))
    for result in results:
        assert result["num_examples"] == 37
        assert result == pytest.approx(results[0], rel=1e-5)


class Mean(nn.Module):
    """A network whose logits are the means of what it is given, channel by channel."""

    @nn.compact
    def __call__(self, x, train):
        assert not train
        return x.mean(axis=(1, 2)) * self.param("scale", nn.initializers.ones, (3,))


def test_raw_images_are_normalised_by_the_configurations_mean_and_deviation():
    data = tiny.config(data__mean=(0.5, 0.4, 0.3), data__std=(0.2, 0.25, 0.5)).data
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    expected = ((images.astype(np.float64) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]).mean(axis=(1, 2)) * 2
    logits = apply_network(Mean(), data, {"params": {"scale": np.full(3, 2.0, np.float32)}}, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
