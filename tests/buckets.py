"""Buckets on 127.0.0.1, for tests that speak the real protocols: moto's S3 and gcp-storage-emulator's GCS."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from hga_flax.runs.manifest import find_damage
from hga_flax.storage import buckets as storage
from tests import gcs_emulator

BUCKET = "bucket"
NEEDED = {"s3": ("s3fs", "moto", "flask"), "gs": ("gcsfs", "gcp_storage_emulator")}
ENVIRONMENTS = {
    "s3": {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"},
    "gs": {},
}
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}
COMMANDS = {
    "s3": ("-c", "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"),
    "gs": (gcs_emulator.__file__,),
}


def missing(scheme):
    """Returns the packages without which there is no such bucket here."""
    return [package for package in NEEDED[scheme] if importlib.util.find_spec(package) is None]


def needs(scheme):
    return pytest.mark.skipif(bool(missing(scheme)), reason=f"not installed: {', '.join(missing(scheme))}")


@contextlib.contextmanager
def serve(scheme):
    """Yields the environment variables with which this process and others reach an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, *COMMANDS[scheme], str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.2)
        variables = ENVIRONMENTS[scheme] | {ENDPOINTS[scheme]: f"http://127.0.0.1:{port}"}
        os.environ.update(variables)  # fsspec reads it where it makes a file system
        import fsspec

        fsspec.filesystem(scheme).clear_instance_cache()
        if scheme == "s3":
            fsspec.filesystem(scheme).mkdir(BUCKET)
        yield variables
    finally:
        server.kill()
        server.wait()
        for name in (*ENVIRONMENTS[scheme], ENDPOINTS[scheme]):
            os.environ.pop(name, None)


def steps(remote):
    """The complete checkpoints of the bucket."""
    return sorted(name.removesuffix("/seal.json") for name in remote.files() if name.endswith("/seal.json"))


def whole(remote, folder):
    """The checkpoints of the bucket that a run would take for whole now, as a fresh machine finds them."""
    shutil.rmtree(folder, ignore_errors=True)
    names = list(remote.files())
    remote.get(names, folder)
    found = [name.removesuffix("/seal.json") for name in names if name.endswith("/seal.json")]
    damaged = {name: damage for name in found if (damage := find_damage(folder / name, int(name.rpartition("/")[2])))}
    assert not damaged
    return sorted(found)


def fresh_machine(monkeypatch, folder):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(folder))
