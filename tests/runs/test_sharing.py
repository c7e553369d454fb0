"""Real processes: tests/processes/test_distributed.py (a shared folder), tests/test_runs_in_buckets.py (copies)."""

import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.runs import sharing as module
from hga_flax.runs.sharing import LocalCopies, SharedFolder, sharing


@pytest.fixture
def among_two(monkeypatch):
    """Makes this process believe that it is process `index` of two, and that the other says `other`."""

    def pretend(index, other):
        monkeypatch.setattr(module.jax, "process_count", lambda: 2)
        monkeypatch.setattr(module.jax, "process_index", lambda: index)
        monkeypatch.setattr(module, "agree", lambda own: other if index else own)
        monkeypatch.setattr(module, "all_true", lambda own: own and other)
        for name in ("barrier", "wait_for_all"):
            monkeypatch.setattr(module, name, lambda name: None)

    return pretend


def test_a_single_process_decides_for_itself(tmp_path):
    alone = sharing(tmp_path)
    assert type(alone) is SharedFolder and alone.group() is None
    assert alone.decide(True) and not alone.decide(False)
    assert alone.damage(lambda: None) is None and alone.damage(lambda: "it is cut") == "it is cut"
    alone.check_same(lambda: [1], tmp_path, writes=True)
    assert list(tmp_path.iterdir()) == []
    alone.wait("here")


def test_local_copies_are_recognised_by_their_folder(tmp_path, monkeypatch, among_two):
    monkeypatch.setattr(module, "is_local_copy", lambda folder: folder.name == "copy")
    assert type(sharing(tmp_path / "copy")) is SharedFolder  # one process has nothing to agree on
    among_two(0, True)
    assert type(sharing(tmp_path / "copy")) is LocalCopies and type(sharing(tmp_path)) is SharedFolder


def test_in_a_shared_folder_process_0_decides(among_two):
    def never():
        raise AssertionError("process 0 alone reads the files")

    for other in (True, False):
        among_two(1, other)
        assert SharedFolder().decide(not other) == other
        assert SharedFolder().damage(never) == (None if other else "another process says so")
    state = {"x": np.ones(2)}
    assert SharedFolder().to_save(state) is state  # each process writes its part


def test_with_local_copies_each_process_looks_for_itself_and_process_0_writes(among_two, tmp_path):
    copies = LocalCopies()
    among_two(1, True)
    assert copies.group() == {1} and copies.to_save({"x": 1}) is None
    assert copies.decide(True) and not copies.decide(False)
    assert copies.damage(lambda: None) is None and copies.damage(lambda: "it is cut") == "it is cut"
    among_two(1, False)
    assert copies.damage(lambda: None) == "another process says so"
    among_two(0, True)
    assert isinstance(copies.to_save({"x": module.jax.numpy.ones(2)})["x"], np.ndarray)
    among_two(1, 7)
    with pytest.raises(UserError, match=f"find different checkpoints in {tmp_path}"):
        copies.check_same(lambda: [1, 2], tmp_path, writes=True)


@pytest.mark.parametrize("writes", [True, False])
def test_processes_that_see_different_folders_or_checkpoints_are_refused(among_two, tmp_path, monkeypatch, writes):
    monkeypatch.setattr(module, "SEEN_AFTER", (0.0, 0.0))
    line = rf"^the processes of this run do not see the same folder {tmp_path}: give all of them one"
    among_two(0, True)
    SharedFolder().check_same(lambda: [1], tmp_path, writes=writes)
    assert list(tmp_path.iterdir()) == []
    for index, other in ((0, False), (1, 5)):  # the other does not see this one's file; this one sees other steps
        among_two(index, other)
        with pytest.raises(UserError, match=line):
            SharedFolder().check_same(lambda: [1], tmp_path, writes=writes)
    looks = iter([[1], [1, 2]])  # a network disk shows a change later
    among_two(0, True)
    monkeypatch.setattr(module, "all_true", lambda own: next(looks) == [1, 2])
    SharedFolder().check_same(lambda: [1], tmp_path, writes=writes)
