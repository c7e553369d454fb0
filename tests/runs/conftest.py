"""A bucket of a run, and an uploader to it, for tests/runs/test_uploader.py."""

import threading

import pytest

from hga_flax.runs import uploader as m
from hga_flax.runs.local_copy import LocalCopy
from hga_flax.runs.uploader import BucketUploader
from hga_flax.storage.buckets import Remote


@pytest.fixture
def remote(bucket, monkeypatch):
    monkeypatch.setattr(m, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(m, "PAUSES", (0.0, 0.0))
    return Remote(f"{bucket}/run", "--workdir")


@pytest.fixture
def uploader(remote):
    """A uploader whose thread does not run: the tests do its work."""
    uploader = BucketUploader(LocalCopy(remote.address, "--workdir", trains=True))
    uploader.catch_up()
    return uploader


class Operations(list):
    """What was done to a bucket, one after the other; `after` is called after each."""

    after = staticmethod(lambda: None)


@pytest.fixture
def operations(remote, monkeypatch):
    done, lock = Operations(), threading.Lock()
    system = type(remote._fs())
    for name in ("pipe_file", "put_file", "cp_file", "rm_file"):
        work = getattr(system, name)

        def noted(self, *paths, name=name, work=work, **more):
            with lock:
                work(self, *paths, **more)
                there = str(paths[-1] if name in ("cp_file", "put_file") else paths[0])
                done.append((name, there.removeprefix("bucket/run/")))
                done.after()

        monkeypatch.setattr(system, name, noted)
    return done
