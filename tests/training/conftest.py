"""A run of three steps, for the tests of what starts from one."""

import pytest

from hga_flax.training.trainer import train
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(tiny.config(training__steps=3), str(folder))
    return folder
