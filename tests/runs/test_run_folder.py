"""A run in a bucket: also tests/runs/test_uploader.py and tests/test_runs_in_buckets.py."""

import pytest

from hga_flax.errors import UserError
from hga_flax.runs.run_folder import run_folder
from hga_flax.runs.uploader import BucketUploader, Uploader


def test_a_local_folder_is_claimed_until_the_end(tmp_path):
    path = str(tmp_path / "run")
    with run_folder(path, 0) as (folder, uploader):
        assert folder == tmp_path / "run" and type(uploader) is Uploader
        with pytest.raises(UserError, match="another command trains there: process"), run_folder(path, 0):
            pass
    with run_folder(path, 0):
        pass


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
