"""All parts together are all the slow tests, each once, and none takes too long."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests import shards as module
from tests.commands import ROOT
from tests.shards import SECONDS, longest_files_first, seconds, shards, take_shard

SLOW_MACHINE = 2 / 3  # its two cores, in cores of the machine on which slow_seconds.json was written
NAMES = [f"tests/test_{file}.py::test_{name}[{case}]" for file in "abc" for name in "xyz" for case in range(9)]


def taken(shard, names=NAMES):
    """The tests that pytest is left with, and those that it is told were deselected."""
    gone = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(item.nodeid for item in items))
    items = [SimpleNamespace(nodeid=name) for name in names]
    take_shard(SimpleNamespace(getoption=lambda name: shard, hook=hook), items)
    return [item.nodeid for item in items], gone


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_all_parts_are_all_tests_each_once(n):
    parts = [taken(f"{k}/{n}")[0] for k in range(1, n + 1)]
    assert sorted(itertools.chain(*parts)) == sorted(NAMES)
    for k, part in enumerate(parts, 1):
        assert part == [name for name in NAMES if name in part]  # in their order
        assert sorted(part + taken(f"{k}/{n}")[1]) == sorted(NAMES)


def test_the_parts_follow_from_the_names_alone():
    assert [sorted(part) for part in shards(NAMES[::-1], 4)] == [sorted(part) for part in shards(NAMES, 4)]


def test_long_tests_are_spread(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", {"tests/test_a.py::test_x": 100, "tests/test_b.py::test_y": 1})
    parts = shards(NAMES, 3)
    assert [sum("a.py::test_x" in name for name in part) for part in parts] == [3, 3, 3]
    loads = [sum(map(seconds, part)) for part in parts]
    assert max(loads) - min(loads) <= module.DEFAULT


def test_the_longest_file_comes_first_and_keeps_its_order(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", {"b.py::x": 100, "c.py::y": 3})
    marks = {"b.py::x": "slow", "c.py::y": "slow", "e.py::x": "medium"}
    item = lambda name: SimpleNamespace(nodeid=name, get_closest_marker=lambda mark: marks.get(name) == mark)
    items = [item(name) for name in ("a.py::x", "a.py::y", "b.py::y", "b.py::x", "c.py::y", "d.py::x", "e.py::x")]
    longest_files_first(items)
    names = [i.nodeid for i in items]
    assert names == ["b.py::y", "b.py::x", "e.py::x", "c.py::y", "a.py::x", "a.py::y", "d.py::x"]


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/2/3", "-1/-1", ""])
def test_a_part_that_does_not_exist_is_refused(shard):
    with pytest.raises(pytest.UsageError, match="k/N with k from 1 to N"):
        taken(shard)


@pytest.mark.parametrize(("minutes", "fails", "parts"), [(55, "no", 8), (0, "no", 1), (55, "SHARD", 1)])
def test_ci_runs_every_part_or_as_many_as_there_is_time_for(minutes, fails, parts, tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    script = tmp_path / ".ci" / "run"
    script.write_text(re.sub(r"^MINUTES=.*", f"MINUTES={minutes}", script.read_text(), flags=re.MULTILINE))
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(f'#!/bin/sh\nsleep 0.3\necho ran "$@"\ncase "$*" in *{fails}=*) exit 2; esac\n')
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{make.parent}:{os.environ['PATH']}", "GIT_DIR": str(tmp_path)}
    done = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if fails == "no" else 2), done.stderr
    ran = re.findall(r"^ran .* test-slow SHARD=(\d)/8$", done.stdout, re.MULTILINE)
    assert len(ran) == len(set(ran)) == parts
    assert ("slow tests: 1 of 8 parts passed; there is no time" in done.stdout) == (minutes == 0)


@pytest.mark.slow  # collects the whole suite
def test_the_slow_tests_of_today_are_cut_into_parts_of_20_minutes():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=", "-q", "-m", "slow"]
    result = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in result.stdout.splitlines() if "::" in line]
    assert result.returncode == 0 and len(names) > 200, result.stdout[-2000:]
    known = {name.partition("[")[0] for name in names}
    assert set(SECONDS) <= known, "slow_seconds.json names tests that are gone or no longer slow"
    n = int(re.search(r"^SHARDS=(\d+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)[1])
    loads = [sum(map(seconds, part)) / SLOW_MACHINE for part in shards(names, n)]
    assert max(loads) <= 20 * 60, f"raise SHARDS in .ci/run, now {n}"
