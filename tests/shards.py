"""`pytest --shard=k/N`: the k-th of N parts of the tests that are selected.

The parts are even in the seconds of slow_seconds.json (rough CPU seconds of one case of a test;
a test that it does not name takes DEFAULT) and follow from the names of the tests alone, so that every machine cuts
them alike: together they are all the tests, each once.
"""

import collections
import json
import pathlib

import pytest

SECONDS = json.loads(pathlib.Path(__file__).with_name("slow_seconds.json").read_text())
DEFAULT = 10
MEDIUM = 5  # seconds of a medium test


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", metavar="k/N", help="run the k-th of N parts of the selected tests")


def chosen(config):
    """Returns k and N."""
    try:
        k, n = map(int, config.getoption("--shard").split("/"))
    except ValueError:
        k, n = 0, 0
    if not 1 <= k <= n:
        raise pytest.UsageError(f"--shard={config.getoption('--shard')}: k/N with k from 1 to N, such as 2/8")
    return k, n


def take_shard(config, items):
    """Deselects the tests of other parts."""
    k, n = chosen(config)
    taken = set(shards([item.nodeid for item in items], n)[k - 1])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in taken])
    items[:] = [item for item in items if item.nodeid in taken]


def longest_files_first(items):
    """Sorts the files of tests, so that no long one is left to a single process at the end; keeps the order in a file.

    A quick test counts as one second.
    """
    rough = lambda item: MEDIUM if item.get_closest_marker("medium") else 1
    file = lambda item: item.nodeid.partition("::")[0]
    total = collections.Counter()
    for item in items:
        total[file(item)] += seconds(item.nodeid) if item.get_closest_marker("slow") else rough(item)
    items.sort(key=lambda item: (-total[file(item)], file(item)))


def seconds(nodeid):
    return SECONDS.get(nodeid.partition("[")[0], DEFAULT)


def shards(nodeids, n):
    """Cuts the tests into `n` lists: the longest first, each into the list that has the least to do so far."""
    parts, loads = [[] for _ in range(n)], [0.0] * n
    for nodeid in sorted(nodeids, key=lambda nodeid: (-seconds(nodeid), nodeid)):
        least = loads.index(min(loads))
        parts[least].append(nodeid)
        loads[least] += seconds(nodeid)
    return parts
