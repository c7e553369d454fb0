"""The table of keys beside configs/base.py; test_checks.py has what it refuses."""

from configs import base
from hga_flax.config.checks import check_keys, check_together, config_keys, get_key
from hga_flax.config.keys import ALWAYS, FORMER_NAMES, KEYS

LATER = {key: entry.before for key, entry in KEYS.items() if entry.before is not ALWAYS}


def test_the_rules_are_those_of_the_declared_keys_and_admit_their_defaults():
    config = base.get_config()
    assert sorted(KEYS) == sorted(config_keys(config))
    check_keys(config)
    check_together(config)
    for key, entry in KEYS.items():
        value = get_key(config, key)
        assert isinstance(value, tuple) if entry.rule.many else type(value) is entry.rule.kind, key
        assert bool(entry.expects) == entry.rule.many, key


def test_each_key_that_runs_may_lack_has_what_they_went_by():
    """The first version's keys apart, which every run has."""
    first = {key for key in KEYS if key not in LATER}
    assert len(first) == 46, f"a new key of configs/base.py needs `before`: {sorted(first)}"


def test_a_former_name_is_no_key_and_leads_to_one_of_the_same_group():
    for former, key in FORMER_NAMES.items():
        assert former not in KEYS and key in KEYS and former.split(".")[0] == key.split(".")[0]
