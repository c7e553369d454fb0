import functools
import json
import os
import shutil
import socket
import threading
import time
import zlib

import pytest

from hga_flax.errors import UserError
from hga_flax.runs import local_copy
from hga_flax.runs.local_copy import RECORD, SESSION, LocalCopy, Overtaken, find, is_local_copy
from hga_flax.runs.manifest import find_damage, write_manifest
from hga_flax.storage.buckets import Remote, Unreachable
from hga_flax.storage.locks import claimed


def fill(remote, files):
    for name, content in files.items():
        remote.write(name, content)


def checkpoint(step, content=b"weights", folder="checkpoints"):
    """The files of a made-up checkpoint."""
    files = {"state/d/x": content, "run/metadata": b"{}"}
    seal = {"step": step, "files": {name: (len(text), zlib.crc32(text)) for name, text in files.items()}}
    return {
        f"{folder}/{step}/{name}": text for name, text in (files | {"seal.json": json.dumps(seal).encode()}).items()
    }


def names(copy):
    return set(copy.here())


@pytest.fixture
def remote(bucket):
    remote = Remote(f"{bucket}/run", "--workdir")
    fill(remote, {"config.json": b"{}", SESSION: b'{"session": "another"}'} | checkpoint(1) | checkpoint(2))
    return remote


def opened(remote, trains=True):
    copy = LocalCopy(remote.address, "--workdir", trains=trains)
    copy.pull()
    return copy


def test_it_becomes_what_the_bucket_holds_complete(remote):
    remote.delete(["checkpoints/2/seal.json"])
    fill(remote, checkpoint(2, b"old", "superseded"))
    copy = opened(remote)
    assert names(copy) == {"config.json", *checkpoint(1), *checkpoint(2, folder="superseded")}
    assert (copy.folder / "checkpoints/1/state/d/x").read_bytes() == b"weights"
    assert not (copy.folder / "checkpoints/2").exists() and is_local_copy(copy.folder)


def test_only_what_has_changed_is_copied_again(remote, monkeypatch):
    opened(remote).close()
    time.sleep(0.01)
    fill(remote, {"config.json": b"{1}", "new": b"1"})
    remote.delete(checkpoint(1))
    got = []
    get = Remote.get
    monkeypatch.setattr(Remote, "get", lambda self, n, *rest: (got.extend(n := list(n)), get(self, n, *rest)))
    copy = opened(remote)
    assert sorted(got) == ["config.json", "new"]
    assert names(copy) == {"config.json", "new", *checkpoint(2)} and not (copy.folder / "checkpoints/1").exists()
    (copy.folder / "checkpoints/2/state/d/x").write_bytes(b"damaged")  # here
    copy.close()
    got.clear()
    assert (opened(remote).folder / "checkpoints/2/state/d/x").read_bytes() == b"weights"
    assert sorted(got) == sorted(checkpoint(2))


def ahead(remote):
    """Returns a copy that trained, and was killed before it had uploaded its third step and its last metrics."""
    copy = opened(remote)
    copy.begin("mine")
    for name, content in (checkpoint(3) | {"metrics.jsonl": b"3", "checkpoints/4.orbax-checkpoint-tmp/x": b""}).items():
        (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.folder / name).write_bytes(content)
    copy.close()
    return copy


def test_what_no_other_session_has_overtaken_is_kept(remote):
    ahead(remote)
    copy = opened(remote)
    assert names(copy) >= {"metrics.jsonl", *checkpoint(1), *checkpoint(2), *checkpoint(3)}
    assert not any(map(copy.is_up, checkpoint(3))) and all(map(copy.is_up, checkpoint(2)))


@pytest.mark.parametrize("arrives", [True, False])
def test_a_session_that_is_cut_short_as_it_begins_keeps_what_the_one_before_had_not_uploaded(
    remote, monkeypatch, arrives
):
    ahead(remote)
    copy, write = opened(remote), Remote.write

    def cut(self, *arguments):
        if arrives:
            write(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Remote, "write", cut)
        copy.begin("next")
    copy.close()
    copy = opened(remote)
    assert names(copy) >= {"metrics.jsonl", *checkpoint(3)}
    copy.begin("last")
    copy.check_own()
    for session in ("mine", "next"):
        fill(remote, {SESSION: json.dumps({"session": session}).encode()})
        with pytest.raises(Overtaken):
            copy.check_own()


def test_what_was_written_since_the_last_upload_is_kept_too(remote):
    """A step that was saved again, and metrics whose upload was the last thing that the session did."""
    copy = ahead(remote)
    fill(remote, {"metrics.jsonl": b"2"})
    for name, content in (checkpoint(2, b"again") | {"checkpoints/2/state/d/y": b"again"}).items():
        (copy.folder / name).write_bytes(content)
    copy = opened(remote)
    read = lambda name: (copy.folder / name).read_bytes()
    assert read("metrics.jsonl") == b"3"
    assert [read(f"checkpoints/2/state/d/{name}") for name in "xy"] == [b"again", b"again"]
    assert not copy.is_up("checkpoints/2/seal.json")


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "seal", "beside"])
def test_what_is_damaged_here_is_copied_anew_and_not_taken_for_ahead(remote, damage):
    remote.write("checkpoints/2/_CHECKPOINT_METADATA", b"{}")
    copy = ahead(remote)
    file = (
        copy.folder / "checkpoints/2" / {"seal": "seal.json", "beside": "_CHECKPOINT_METADATA"}.get(damage, "state/d/x")
    )
    times = file.stat()
    if damage == "gone":
        file.unlink()
    elif damage == "changed":  # in one bit, by the disk
        file.write_bytes(b"Weights")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        file.write_bytes(file.read_bytes()[:1])
    copy = opened(remote)
    for name in (*checkpoint(2), "checkpoints/2/_CHECKPOINT_METADATA"):
        assert (copy.folder / name).read_bytes() == remote.read(name) and copy.is_up(name)
    assert names(copy) >= checkpoint(3).keys()  # which is ahead


def test_a_log_that_is_shorter_here_than_there_is_copied_anew(remote):
    fill(remote, {"metrics.jsonl": b"123", "tensorboard/events": b"123"})
    copy = opened(remote)
    copy.begin("mine")
    (copy.folder / "metrics.jsonl").write_bytes(b"1")
    (copy.folder / "tensorboard/events").write_bytes(b"12345")
    copy.close()
    copy = opened(remote)
    assert (copy.folder / "metrics.jsonl").read_bytes() == b"123" and copy.is_up("metrics.jsonl")
    assert (copy.folder / "tensorboard/events").read_bytes() == b"12345" and not copy.is_up("tensorboard/events")


def test_another_session_makes_the_bucket_the_truth(remote):
    ahead(remote)
    fill(remote, {SESSION: b'{"session": "elsewhere"}'})
    assert names(opened(remote)) == {"config.json", *checkpoint(1), *checkpoint(2)}


@pytest.mark.parametrize("session", [b"", b"[]", b'{"session": null}', None])
def test_a_bucket_without_a_session_is_the_truth_too(remote, session):
    ahead(remote)
    fill(remote, {SESSION: session}) if session is not None else remote.delete([SESSION])
    assert names(opened(remote)) == {"config.json", *checkpoint(1), *checkpoint(2)}


def test_a_run_that_was_removed_is_not_brought_back(remote):
    ahead(remote)
    remote.delete(remote.files())
    assert names(opened(remote)) == set()


def test_what_was_uploaded_and_then_removed_by_somebody_stays_removed(remote):
    copy = opened(remote)
    copy.begin("mine")
    copy.close()
    remote.delete(["checkpoints/2/seal.json"])
    copy = opened(remote)
    assert names(copy) == {"config.json", *checkpoint(1)}
    copy.close()
    time.sleep(0.01)
    fill(remote, {"config.json": b"{2}"})  # and what was changed by somebody is taken
    assert (opened(remote).folder / "config.json").read_bytes() == b"{2}"


def test_a_session_knows_whether_the_bucket_is_still_its_own(remote):
    copy = opened(remote)
    copy.begin("mine")
    copy.check_own()
    fill(remote, {SESSION: b'{"session": "elsewhere"}'})
    with pytest.raises(Overtaken, match=r"^another command has begun to train in s3://bucket/run; this one stops"):
        copy.check_own()
    remote.delete([SESSION])
    with pytest.raises(Overtaken, match=r"^session\.json was removed from s3://bucket/run; this one stops"):
        copy.check_own()


def test_a_reader_takes_nothing_for_its_own(remote):
    folder = ahead(remote).folder
    copy = opened(remote, trains=False)
    assert copy.folder != folder and names(copy) == {"config.json", *checkpoint(1), *checkpoint(2)}


def test_each_process_that_reads_has_a_twin_of_its_own(remote):
    first, second = opened(remote, trains=False), opened(remote, trains=False)
    assert first.folder != second.folder and names(first) == names(second)
    first.close()
    third = opened(remote, trains=False)
    assert third.folder == first.folder
    second.close()


def test_one_command_trains_in_an_address_at_a_time(remote):
    first = opened(remote)
    who = f"process {os.getpid()} on {socket.gethostname()}"
    line = f"another command trains in s3://bucket/run: {who}; wait for its end, or choose another --workdir"
    with pytest.raises(UserError, match=f"^{line}$"):
        opened(remote)
    assert names(opened(remote, trains=False)) == names(first)
    first.close()
    assert opened(remote).folder == first.folder


def test_a_checkpoint_of_which_the_bucket_has_lost_a_file_is_kept_and_counts_as_not_uploaded(remote):
    copy = ahead(remote)
    copy.uploaded([(name, copy.stat(name)) for name in copy.here() if name in copy.remote.files()])
    copy.close()
    remote.delete(["checkpoints/2/state/d/x"])
    again = opened(remote)
    assert find_damage(again.folder / "checkpoints/2", 2) is None
    assert not again.is_up("checkpoints/2/seal.json") and again.is_up("checkpoints/1/seal.json")


def test_after_an_interruption_only_the_rest_is_copied(remote, monkeypatch):
    get, asked = Remote.get, []

    def interrupted(self, names, folder, done):
        names = sorted(names)
        asked.append(names)
        get(self, names[: len(names) // 2] if len(asked) == 1 else names, folder, done)
        if len(asked) == 1:
            raise Unreachable("gone")

    monkeypatch.setattr(Remote, "get", interrupted)
    copy = LocalCopy(remote.address, "--workdir")
    with pytest.raises(Unreachable):
        copy.pull()
    copy.pull()
    assert len(asked[0]) == 7 and asked[1] == asked[0][3:]
    assert names(copy) == {"config.json", *checkpoint(1), *checkpoint(2)}


def test_a_folder_of_many_runs_is_not_copied_and_odd_names_are_left_there(remote):
    fill(remote, {"tensorboard//x": b"1", "plots/./x": b"1", RECORD: b"{}"})
    copy = opened(remote, trains=False)
    assert names(copy) == {"config.json", *checkpoint(1), *checkpoint(2)}
    remote.delete(["config.json"])
    assert names(opened(remote, trains=False)) == {*checkpoint(1), *checkpoint(2)}  # which init.weights can use
    above = LocalCopy(remote.address.rpartition("/")[0], "--workdir")
    above.pull()
    assert names(above) == set()


def test_found_by_its_path_an_address_is_brought_up_to_date_each_time(remote, tmp_path):
    assert find(str(tmp_path)) == tmp_path and not is_local_copy(tmp_path)
    folder = find(remote.address, light=True)
    assert {p.name for p in (folder / "checkpoints/2").iterdir()} == {"seal.json"}
    assert find(remote.address) == folder and (folder / "checkpoints/2/state/d/x").exists()
    remote.delete(checkpoint(1))
    find(remote.address, light=True)
    assert (folder / "checkpoints/2/state/d/x").exists() and not (folder / "checkpoints/1").exists()
    with pytest.raises(UserError, match=r"^init\.weights=s3://: write s3://BUCKET/FOLDER$"):
        find("s3://", "init.weights")


@pytest.mark.parametrize("trains", [False, True])
def test_a_reader_whose_copy_is_removed_goes_on_with_another(remote, monkeypatch, trains):
    """It may be a notebook. Who trains in a copy that was removed ends at once."""
    left = []
    monkeypatch.setattr(local_copy, "claimed", functools.partial(claimed, stale_seconds=0.6))
    monkeypatch.setattr(local_copy, "leave", lambda code, text: left.append((code, text)))
    copy = opened(remote) if trains else None  # which holds its claim as long as it is there
    folder = copy.folder if trains else find(remote.address)
    shutil.rmtree(folder.parent)
    time.sleep(0.3)
    end = f"error: the copy of {remote.address} on this machine was removed or taken over by another command"
    assert [text.partition(";")[0] for _, text in left[:1]] == [end] * trains
    if not trains:
        assert (find(remote.address) / "checkpoints/2/state/d/x").exists()


def test_a_run_that_goes_on_while_it_is_read_is_read_again(remote, monkeypatch):
    listed, files = [], Remote.files

    def list_and_remove(self):
        found = files(self)
        if not listed:
            self.delete(checkpoint(1))
        listed.append(1)
        return found

    monkeypatch.setattr(Remote, "files", list_and_remove)
    assert names(opened(remote)) == {"config.json", *checkpoint(2)} and len(listed) == 2

    def vanish(self, files, *rest):
        raise FileNotFoundError

    monkeypatch.setattr(Remote, "get", vanish)
    fill(remote, {"new": b""})
    with pytest.raises(UserError, match=r"^--workdir=s3://bucket/run: it changes while it is read; try again$"):
        opened(remote, trains=False)


def test_folders_that_vanish_while_it_looks_are_passed_over(remote):
    copy, stop = opened(remote), threading.Event()

    def come_and_go():
        while not stop.is_set():
            (copy.folder / "checkpoints/9/state/d/e").mkdir(parents=True)
            (copy.folder / "checkpoints/9/state/d/e/x").write_text("")
            shutil.rmtree(copy.folder / "checkpoints/9")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(200):
            assert names(copy) >= checkpoint(1).keys()
    finally:
        stop.set()
        thread.join()


def test_a_damaged_record_and_a_bucket_that_cannot_be_written_to(remote, monkeypatch):
    copy = opened(remote)
    for text in ("", "[]", '{"files": [1]}', '{"sessions": [1], "files": {"a": 1}}'):
        (copy.folder / RECORD).write_text(text)
        copy.close()
        copy = opened(remote)
        assert json.loads((copy.folder / RECORD).read_text())["files"].keys() == names(copy)

    def refuse(*arguments):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(remote._fs()), "pipe_file", refuse)
    with pytest.raises(Unreachable, match=r"cannot be written to: no permission \(Access Denied\)"):
        copy.begin("mine")


def test_the_seal_tells_what_a_copy_that_was_cut_short_lacks(remote, tmp_path):
    for name, content in checkpoint(1).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path / "checkpoints/1", 1)
    remote.put(tmp_path, checkpoint(1))
    assert find_damage(opened(remote).folder / "checkpoints/1", 1) is None
    remote.write("checkpoints/1/state/d/x", b"weight")
    assert "6 bytes instead of 7" in find_damage(opened(remote).folder / "checkpoints/1", 1)
