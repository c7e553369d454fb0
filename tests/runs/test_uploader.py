import json
import pathlib
import re
import shutil
import time

import pytest

from hga_flax.errors import UserError
from hga_flax.runs import uploader as m
from hga_flax.runs.local_copy import LocalCopy, Overtaken
from hga_flax.runs.manifest import find_damage, write_manifest
from hga_flax.runs.run_folder import run_folder
from hga_flax.runs.uploader import BucketUploader
from hga_flax.storage.buckets import Remote, Unreachable
from hga_flax.training.trainer import train
from tests.buckets import fresh_machine, steps, whole
from tests.training import tiny

STATE, RUN = "state/d/x", "run/metadata"


def make(uploader, step, content=b"weights", folder="checkpoints"):
    """Makes a complete checkpoint in the copy, as Orbax does: in one move."""
    scratch = uploader._folder / folder / f"{step}.orbax-checkpoint-tmp"
    for name, text in {STATE: content, RUN: b"{}", "_CHECKPOINT_METADATA": b"{}"}.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(text)
    write_manifest(scratch, step)
    scratch.rename(scratch.with_name(str(step)))


def drop(uploader, step):
    """Removes a checkpoint as Orbax does where the policy no longer keeps it."""
    uploader.dropped(step)
    shutil.rmtree(uploader._folder / f"checkpoints/{step}", ignore_errors=True)


def push(uploader):
    uploader._push_checkpoints()
    uploader._push_others()


def test_a_checkpoint_is_uploaded_its_seal_last_and_removed_its_seal_first(uploader, remote, operations):
    make(uploader, 1)
    (uploader._folder / "checkpoints/2.orbax-checkpoint-tmp").mkdir()  # not complete
    assert uploader._push_checkpoints() and not uploader._push_checkpoints()
    assert operations[-1] == ("pipe_file", "checkpoints/1/seal.json") and len(operations) == 4
    assert steps(remote) == ["checkpoints/1"]
    make(uploader, 2)
    drop(uploader, 1)
    operations.clear()
    assert uploader._push_checkpoints()
    removed = [name for kind, name in operations if kind == "rm_file"]
    assert removed[0] == "checkpoints/1/seal.json" and operations[3] == ("pipe_file", "checkpoints/2/seal.json")
    assert remote.files().keys() == {f"checkpoints/2/{n}" for n in (STATE, RUN, "_CHECKPOINT_METADATA", "seal.json")}


def test_a_step_that_is_saved_again_is_in_the_bucket_at_every_moment(uploader, remote, operations, tmp_path):
    make(uploader, 1)
    push(uploader)
    aside = uploader._folder / "superseded/1"
    aside.parent.mkdir()
    (uploader._folder / "checkpoints/1").rename(aside)
    push(uploader)
    assert steps(remote) == ["checkpoints/1"]  # its successor is being written here
    make(uploader, 1, b"weights again")
    shutil.rmtree(aside)
    moments = []
    operations.after = lambda: moments.append(tuple(whole(remote, tmp_path / "now")))
    push(uploader)
    assert all(moments) and len(moments) >= 12
    assert set(moments) == {("checkpoints/1",), ("checkpoints/1", "superseded/1"), ("superseded/1",)}
    assert moments[-1] == ("checkpoints/1",) and remote.read(f"checkpoints/1/{STATE}") == b"weights again"
    assert not any(name.startswith("superseded") for name in remote.files())


def test_a_kill_between_any_two_operations_leaves_a_step_that_a_fresh_machine_reads(remote, operations, tmp_path):
    """The bucket is taken at every moment of three uploads, the last of a step that is saved again."""
    uploader = BucketUploader(LocalCopy(remote.address, "--workdir", trains=True))
    moments = []

    def look():
        found = whole(remote, tmp_path / "now")
        newest = json.loads((tmp_path / "now" / m.NEWEST).read_text())["step"] if m.NEWEST in remote.files() else 0
        assert newest == 0 or found, "a step is said to have been complete, and there is none"
        moments.append(max((int(name.rpartition("/")[2]) for name in found), default=0))

    operations.after = look
    for step in (1, 2, 2):
        shutil.rmtree(uploader._folder / f"checkpoints/{step}", ignore_errors=True)
        drop(uploader, step - 1)
        make(uploader, step, b"%d %d" % (step, len(moments)))
        (uploader._folder / m.NEWEST).write_text(json.dumps({"step": step}))
        push(uploader)
    assert moments == sorted(moments) and moments[-1] == 2


def test_what_an_upload_that_was_cut_short_left_is_removed_or_completed(uploader, remote):
    for name in (f"checkpoints/3/{STATE}", f"checkpoints/4/{STATE}", "checkpoints/4/other"):
        remote.write(name, b"part")
    uploader.catch_up()
    assert f"checkpoints/3/{STATE}" in remote.files()  # before the session begins nothing is removed
    make(uploader, 4)
    push(uploader)
    assert steps(remote) == ["checkpoints/4"] and {n.split("/")[1] for n in remote.files()} == {"4"}
    assert remote.read(f"checkpoints/4/{STATE}") == b"weights" and "checkpoints/4/other" not in remote.files()


def test_other_files_are_uploaded_whole_when_they_have_changed(uploader, remote, operations):
    files = {"metrics.jsonl": "1", "tensorboard/events": "1", "damaged/3/x": "1", ".hidden": "1", "a/.new": "1"}
    for name, text in files.items():
        (uploader._folder / name).parent.mkdir(parents=True, exist_ok=True)
        (uploader._folder / name).write_text(text)
    push(uploader)
    assert remote.files().keys() == {"metrics.jsonl", "tensorboard/events", "damaged/3/x"}
    operations.clear()
    with (uploader._folder / "metrics.jsonl").open("a") as file:
        file.write("2")
    push(uploader)
    push(uploader)
    assert operations == [("pipe_file", "metrics.jsonl")] and remote.read("metrics.jsonl") == b"12"


def test_who_goes_on_from_a_step_has_every_line_up_to_it(uploader, remote, operations):
    lines = []  # that there were, whenever a step became complete
    seal = lambda: operations[-1][1].endswith("seal.json") and lines.append(remote.read("metrics.jsonl"))
    operations.after = seal
    for step in (1, 2):
        (uploader._folder / "metrics.jsonl").write_text("line\n" * step)
        make(uploader, step)
        uploader.finish()
    assert lines == [b"line\n", b"line\nline\n"]


def test_a_step_is_not_said_to_have_been_complete_before_it_is_there(uploader, remote):
    (uploader._folder / m.NEWEST).write_text('{"step": 1}')
    uploader._push_others()
    assert m.NEWEST not in remote.files()
    make(uploader, 1)
    push(uploader)
    assert json.loads(remote.read(m.NEWEST)) == {"step": 1}


def test_a_checkpoint_that_is_removed_here_while_it_is_uploaded_is_left_out(uploader, remote):
    make(uploader, 1)
    (uploader._folder / "checkpoints/1" / STATE).unlink()
    push(uploader)
    assert steps(remote) == []


def refuse(remote, monkeypatch, times=10**6, only=""):
    """Has the bucket refuse so many writes of files whose names hold `only`."""
    system, left = type(remote._fs()), [times]
    write = system.pipe_file

    def fail(self, path, *arguments, **more):
        if only in path and left[0] > 0:
            left[0] -= 1
            raise ConnectionError("gone")
        return write(self, path, *arguments, **more)

    monkeypatch.setattr(system, "pipe_file", fail)


def test_a_step_that_is_saved_again_is_whole_beside_tries_that_fail(
    uploader, remote, tmp_path, operations, monkeypatch
):
    make(uploader, 1)
    push(uploader)
    shutil.rmtree(uploader._folder / "checkpoints/1")
    make(uploader, 1, b"weights again")
    moments = []
    operations.after = lambda: moments.append(whole(remote, tmp_path / "now"))
    refuse(remote, monkeypatch, times=1, only=f"checkpoints/1/{STATE}")  # when the former one's seal is removed
    with pytest.raises(Unreachable):
        push(uploader)
    assert steps(remote) == ["superseded/1"] and remote.read(f"superseded/1/{STATE}") == b"weights"
    push(uploader)
    assert all(moments) and whole(remote, tmp_path / "now") == ["checkpoints/1"]
    assert remote.read(f"checkpoints/1/{STATE}") == b"weights again"
    assert not any(name.startswith("superseded") for name in remote.files())


def test_damage_on_this_machine_costs_the_bucket_nothing(uploader, remote):
    uploader._copy.begin("mine")
    make(uploader, 1)
    push(uploader)
    uploader._copy.close()
    (uploader._folder / "checkpoints/1" / STATE).write_bytes(b"weight")
    folder = BucketUploader(LocalCopy(remote.address, "--workdir", trains=True)).catch_up()
    assert folder == uploader._folder and find_damage(folder / "checkpoints/1", 1) is None
    assert steps(remote) == ["checkpoints/1"] and remote.read(f"checkpoints/1/{STATE}") == b"weights"


def test_a_session_that_another_has_overtaken_changes_nothing_in_the_bucket(uploader, remote, tmp_path, monkeypatch):
    said = []
    uploader.begin(said.append)
    make(uploader, 1)
    uploader.finish()
    fresh_machine(monkeypatch, tmp_path / "another")
    other = BucketUploader(LocalCopy(remote.address, "--workdir", trains=True))
    other.catch_up()
    other.begin(print)
    before = remote.files()
    drop(uploader, 1)
    make(uploader, 2)
    (uploader._folder / "metrics.jsonl").write_text("1")
    for end in (uploader.finish, uploader.close, uploader._push_others):
        with pytest.raises(Overtaken, match=r"^another command has begun to train in s3://bucket/run; this one stops"):
            end()
    assert remote.files() == before and not said
    other.close()


@pytest.mark.parametrize("cleared", [".", "checkpoints", "checkpoints/1"])
def test_what_is_missing_here_and_was_not_dropped_stays_in_the_bucket(uploader, remote, cleared):
    for step in (1, 2):
        make(uploader, step)
    push(uploader)
    shutil.rmtree(uploader._folder / cleared)
    assert not uploader._remove_old()
    uploader.finish()
    assert steps(remote) == ["checkpoints/1", "checkpoints/2"]


def test_a_bucket_that_lets_nothing_be_deleted_is_a_warning_and_costs_no_checkpoint(remote, uploader, monkeypatch):
    said, delete, tries = [], Remote.delete, []

    def deny(self, names):
        if not list(names):
            return
        tries.append(1)
        raise Unreachable("--workdir=s3://bucket/run cannot be written to: no permission")

    monkeypatch.setattr(Remote, "delete", deny)
    uploader._warn = said.append
    make(uploader, 1)
    uploader.finish()
    for step in (2, 3):
        make(uploader, step)
        drop(uploader, step - 1)
        uploader.finish()
        before = len(tries)
        assert not uploader._push_checkpoints() and len(tries) == before  # not again before the next checkpoint
    assert steps(remote) == ["checkpoints/1", "checkpoints/2", "checkpoints/3"]
    assert said == [
        "warning: --workdir=s3://bucket/run cannot be written to: no permission; checkpoints that are no longer kept "
        "stay there"
    ]
    monkeypatch.setattr(Remote, "delete", delete)
    make(uploader, 4)
    uploader.finish()
    assert steps(remote) == ["checkpoints/3", "checkpoints/4"]


def test_training_that_waits_for_an_upload_says_so(remote, uploader, monkeypatch):
    said, put = [], Remote.put
    monkeypatch.setattr(m, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(Remote, "put", lambda *arguments: (time.sleep(0.1), put(*arguments)))
    uploader._warn = said.append
    uploader.finish()  # nothing to do
    make(uploader, 1)
    uploader.finish()
    assert said == ["waiting for s3://bucket/run: a checkpoint is being uploaded"]


def test_nothing_is_removed_while_a_complete_step_is_not_up(uploader, remote):
    make(uploader, 1)
    push(uploader)
    drop(uploader, 1)
    make(uploader, 2)  # after `_upload_new` has looked
    assert not uploader._remove_old() and steps(remote) == ["checkpoints/1"]
    push(uploader)
    assert steps(remote) == ["checkpoints/2"]


def test_the_thread_works_by_itself_and_the_end_waits_for_it(remote, uploader):
    said = []
    uploader.begin(said.append)
    make(uploader, 1)
    deadline = time.monotonic() + 10
    while steps(remote) != ["checkpoints/1"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    make(uploader, 2)
    (uploader._folder / "metrics.jsonl").write_text("1")
    uploader.close()
    assert steps(remote) == ["checkpoints/1", "checkpoints/2"] and "metrics.jsonl" in remote.files() and not said


def test_a_checkpoint_that_cannot_be_uploaded_is_tried_again_then_ends_the_run_in_one_line(
    remote, uploader, monkeypatch
):
    make(uploader, 1)
    refuse(remote, monkeypatch, times=2, only="checkpoints")
    uploader.finish()
    assert steps(remote) == ["checkpoints/1"]
    make(uploader, 2)
    refuse(remote, monkeypatch, only="checkpoints")
    line = (
        "the newest checkpoint cannot be uploaded: --workdir=s3://bucket/run cannot be written to: the storage does "
        "not answer (gone); is the network up, and the endpoint right?; the ones before are kept there, it is kept "
        "here, and the same command on this machine uploads it and resumes"
    )
    with pytest.raises(UserError, match=re.escape(line)):
        uploader.finish()
    tries = uploader._remote.put = lambda *arguments: pytest.fail("it is not tried for ever")
    assert tries and uploader.close() is None
    assert steps(remote) == ["checkpoints/1"]


def test_a_checkpoint_that_this_machine_cannot_read_ends_the_run_in_one_line_too(remote, uploader, monkeypatch):
    make(uploader, 1)
    read = pathlib.Path.read_bytes

    def fail(file):
        if file.name == "x":
            raise OSError(5, "Input/output error", str(file))
        return read(file)

    monkeypatch.setattr(pathlib.Path, "read_bytes", fail)
    with pytest.raises(UserError, match=rf"^the newest .*/{STATE}: Input/output error \(on this machine\); the ones"):
        uploader.finish()

    def list_nothing(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(pathlib.Path, "iterdir", list_nothing)
    with pytest.raises(UserError, match=r"^the newest checkpoint .* Input/output error.*; the ones before are"):
        uploader.finish()
    assert steps(remote) == []


def test_metrics_that_cannot_be_uploaded_are_a_warning_said_once(remote, uploader, monkeypatch):
    said = []
    uploader.begin(said.append)
    refuse(remote, monkeypatch, only="metrics")
    monkeypatch.setattr(m, "LOG_SECONDS", 0.0)
    (uploader._folder / "metrics.jsonl").write_text("1")
    make(uploader, 1)
    deadline = time.monotonic() + 10
    while not said:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    uploader.close()
    assert steps(remote) == ["checkpoints/1"] and len(said) == 2
    assert "cannot be written to: the storage does not answer (gone)" in said[0] and "tried again" in said[0]
    assert "the checkpoints are there, but not all of the metrics and other files" in said[1]


def test_an_error_of_the_run_is_the_one_that_is_told_and_what_there_is_is_uploaded(remote, monkeypatch):
    with pytest.raises(UserError, match=r"^of the run$"), run_folder(remote.address, 0) as (_, uploader):
        uploader.begin(print)
        make(uploader, 1)
        refuse(remote, monkeypatch, times=2, only="checkpoints")
        raise UserError("of the run")
    assert steps(remote) == ["checkpoints/1"]


@pytest.mark.medium
def test_another_model_is_refused_before_anything_is_written(remote, operations):
    train(tiny.config(training__steps=2), remote.address)
    operations.clear()
    with pytest.raises(UserError, match=f"^--workdir={remote.address} belongs to another run"):
        train(tiny.config(model__attention="none"), remote.address)
    assert operations == []
