import itertools

import pytest

from hga_flax.data.pipeline import Shard
from hga_flax.data.sources import DatasetInfo
from hga_flax.training.evaluation import evaluate
from hga_flax.training.experiment import create_experiment
from hga_flax.training.step import make_eval_step
from tests.training import tiny


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
