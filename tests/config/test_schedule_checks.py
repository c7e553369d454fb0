"""The messages stand in tests/config/bad_configurations.txt; here is what no command line reaches."""

import pytest

from configs import base
from hga_flax.config.schedule_checks import check_schedule
from hga_flax.errors import ConfigError


def schedule(**keys):
    config = base.get_config().schedule
    config.update(keys)
    return config


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_rate_does_not_end_above_its_peak(name):
    check_schedule(schedule(name=name, end_learning_rate=0.1), peak=0.1)
    with pytest.raises(ConfigError, match=r"end_learning_rate=0\.2: is above the peak"):
        check_schedule(schedule(name=name, end_learning_rate=0.2), peak=0.1)
    check_schedule(schedule(name="constant", end_learning_rate=0.2), peak=0.1)


def test_one_length_of_the_warm_up_is_enough():
    lengths = {"warmup_share": 0.1, "warmup_epochs": 1.0, "warmup_steps": 5}
    for key, value in lengths.items():
        check_schedule(schedule(**{key: value}), peak=0.1)
        two = lengths | {key: 0}
        with pytest.raises(ConfigError, match="is the length of the warm-up; set one of them to 0"):
            check_schedule(schedule(**two), peak=0.1)
