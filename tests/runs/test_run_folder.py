"""A run in a bucket: also tests/runs/test_uploader.py and tests/test_runs_in_buckets.py."""

import shutil

import pytest

from hga_flax.errors import UserError
from hga_flax.runs import run_folder as module
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.run_folder import run_folder
from hga_flax.runs.uploader import BucketUploader, Uploader
from tests.runs.test_checkpoints import small


def test_a_local_folder_is_claimed_until_the_end(tmp_path):
    path = str(tmp_path / "run")
    with run_folder(path, 0) as (folder, uploader):
        assert folder == tmp_path / "run" and type(uploader) is Uploader
        with pytest.raises(UserError, match="another command trains there: process"), run_folder(path, 0):
            pass
    with run_folder(path, 0):
        pass


def test_a_run_whose_folder_was_removed_writes_no_checkpoint_there(tmp_path, monkeypatch):
    """Its next heartbeat would come too late: the run that starts there would resume from what it left."""

    def leave(code, line):
        raise SystemExit(line)

    monkeypatch.setattr(module, "leave", leave)
    removed = r"^error: --workdir=.*/run was removed or taken over by another command; this one stops$"
    with run_folder(str(tmp_path / "run"), 0) as (folder, uploader):
        checkpoints = Checkpoints(folder, uploader=uploader)
        checkpoints.save(1, small(1), {}, None)
        checkpoints.wait()
        shutil.rmtree(folder)
        with pytest.raises(SystemExit, match=removed):
            checkpoints.save(2, small(2), {}, None)
        with run_folder(str(tmp_path / "run"), 0):
            with pytest.raises(SystemExit, match=removed):
                checkpoints._seal()  # the thread that finishes a checkpoint
            assert not (folder / "checkpoints").exists()


def test_process_0_claims_for_all(tmp_path):
    path = str(tmp_path / "run")
    with run_folder(path, 0), run_folder(path, 1) as (folder, _):
        assert folder == tmp_path / "run"


def test_a_bucket_is_copied_by_process_0_alone(bucket):
    address = f"{bucket}/run"
    with run_folder(address, 0) as (folder, uploader):
        assert type(uploader) is BucketUploader and folder.is_dir()
        uploader.begin(print)
        (folder / "metrics.jsonl").write_text("1\n")
        with run_folder(address, 1) as (_, other):
            assert type(other) is Uploader
    from hga_flax.storage.buckets import Remote

    assert "metrics.jsonl" in Remote(address, "--workdir").files()
