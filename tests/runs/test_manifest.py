import contextlib
import errno
import json
import pathlib
import shutil
import threading

import pytest

from hga_flax.errors import UserError
from hga_flax.runs import manifest
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.manifest import find_damage, read_again, write_manifest
from tests.runs.test_checkpoints import metrics, same, small


@pytest.fixture
def folder(tmp_path):
    for name in ("state/d/a", "state/m", "run/metadata"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
    write_manifest(tmp_path, 7)
    return tmp_path


def test_what_is_whole_has_no_damage(folder):
    (folder / "notes").write_text("beside the items: not sealed")
    assert find_damage(folder, 7) is None and find_damage(folder, 7, "run") is None


@pytest.mark.parametrize("name", ["state/d/a", "state/m", "run/metadata"])
def test_every_byte_of_every_file_counts(folder, name):
    content = (folder / name).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        (folder / name).write_bytes(bytes(changed))
        assert find_damage(folder, 7) == f"the content of {name} has changed"
    (folder / name).write_bytes(content[:-1])
    assert find_damage(folder, 7) == f"{name} has {len(content) - 1} bytes instead of {len(content)}"
    (folder / name).unlink()
    assert find_damage(folder, 7) == f"{name} is missing"
    assert (find_damage(folder, 7, "run") is None) == (name != "run/metadata")


def test_the_step_is_sealed_too(folder):
    assert "the checkpoint of step 7 under another name" in find_damage(folder, 8)
    assert find_damage(folder / "nowhere", 7) == "it is gone"
    assert find_damage(folder / "seal.json", 7) == "it is not a folder"


def test_a_file_server_that_is_away_says_nothing_about_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x").write_bytes(b"1")
    write_manifest(tmp_path, 3)
    monkeypatch.setattr(manifest, "PAUSE_SECONDS", 0.0)
    read, away = pathlib.Path.read_text, []

    def stale(self, *arguments, **more):
        if away:
            away.pop()
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return read(self, *arguments, **more)

    monkeypatch.setattr(pathlib.Path, "read_text", stale)
    away[:] = [1, 1]
    assert find_damage(tmp_path, 3) is None and not away
    away[:] = [1] * 9
    with pytest.raises(UserError, match=r"cannot be read now: Stale file handle; the same command tries again$"):
        find_damage(tmp_path, 3)


def test_a_manifest_with_other_facts_is_damaged(tmp_path):
    (tmp_path / manifest.NAME).write_text('{"step": 3, "files": {"state/x": [1, 2, 3]}}')
    assert find_damage(tmp_path, 3) == "its seal.json is damaged"


def test_a_folder_that_does_not_answer_is_no_damage_and_one_that_is_not_there_is(tmp_path, monkeypatch):
    assert find_damage(tmp_path / "none", 3) == "it is gone"
    (tmp_path / "file").write_text("")
    assert find_damage(tmp_path / "file", 3) == find_damage(tmp_path / "file" / "below", 3) == "it is not a folder"

    def stale(self, **more):
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    monkeypatch.setattr(manifest, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(pathlib.Path, "read_text", stale)
    with pytest.raises(UserError, match="cannot be read now: Stale file handle"):
        find_damage(tmp_path, 3)


@pytest.mark.parametrize("which", ["restore_latest", "restore_best"])
def test_a_link_to_a_disk_that_is_away_is_no_removed_checkpoint(which, tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), {}, metrics(9.0 - step))
    folder = tmp_path / "checkpoints"
    folder.joinpath("2").rename(tmp_path / "away")
    folder.joinpath("2").symlink_to(tmp_path / "unmounted")
    with contextlib.closing(Checkpoints(tmp_path, read_only=True, warn=(said := []).append)) as checkpoints:
        assert getattr(checkpoints, which)(small(0))[0] == 1
    assert len(said) == 1 and "2 cannot be read: it is gone" in said[0]


def test_an_evaluation_that_a_file_server_does_not_give_now_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PAUSE_SECONDS", 0.0)
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        for step, error in ((1, 1.0), (2, 9.0)):
            checkpoints.save(step, small(step), {}, metrics(error))
    stat = pathlib.Path.stat

    def refuse(path, **options):
        if "checkpoints/1" in str(path):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, **options)

    with contextlib.closing(Checkpoints(tmp_path, keep=1, warn=(said := []).append)) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "stat", refuse)
            patch.setattr(pathlib.Path, "exists", lambda path: "checkpoints/1" not in str(path))  # as on Python 3.14
            assert checkpoints.best_step() == 2 and "1 cannot be read now" in said[0]
        checkpoints.save(3, small(3), {}, metrics(8.0))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3] and checkpoints.best_step() == 1


@pytest.mark.parametrize("which", ["restore_latest", "restore_best"])
@pytest.mark.parametrize("begun", [False, True], ids=["gone", "going"])
def test_what_took_the_place_of_a_removed_checkpoint_is_read(which, begun, tmp_path, monkeypatch):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), {}, metrics(9.0 - step))
    folder = tmp_path / "checkpoints"
    (folder / "3").rename(tmp_path / "3")
    owner = {"machine": "another", "host": "another", "pid": 1, "start": "1"}
    (tmp_path / ".trained_by.0").write_text(json.dumps(owner))  # somebody trains here
    check, calls = Checkpoints._check_whole, []

    def train_meanwhile(self, step, path, item=None):
        calls.append(step)
        if len(calls) == 1:  # between listing 1 and 2 and reading 2
            (tmp_path / "3").rename(folder / "3")
            (folder / "2" / "seal.json").unlink()
            deleting = threading.Timer(0.2 if begun else 0, shutil.rmtree, [folder / "2"])
            deleting.start()
            begun or deleting.join()
        return check(self, step, path, item)

    monkeypatch.setattr(Checkpoints, "_check_whole", train_meanwhile)
    with contextlib.closing(Checkpoints(tmp_path, read_only=True, warn=(said := []).append)) as checkpoints:
        step, restored, _ = read_again(lambda: getattr(checkpoints, which)(small(0)))
    assert step == 3 and same(restored, small(3)) and calls == [2, 3] and said == []
