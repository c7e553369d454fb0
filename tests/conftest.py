"""Eight CPU devices for every test, and a compilation cache that the whole suite shares."""

import gc
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

from tests import shards
from tests.shards import pytest_addoption  # noqa: F401 - pytest finds it here

gc.set_threshold(20_000, 10, 10)  # as commands do, see errors.run_main
CACHE = pathlib.Path(__file__).parent.parent / ".cache"
# The fast tests of what runs on a device pass on others too: benchmarks/gpu/run.py names it.
os.environ["JAX_PLATFORMS"] = os.environ.get("HGA_TEST_PLATFORM") or "cpu"
# On GPUs as training.deterministic sets them.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"
# On CPUs unoptimised programs compile in two thirds of the time, and a test runs each once or twice. Commands that
# tests start (commands.py) optimise theirs, as users do.
UNOPTIMISED = "--xla_backend_optimization_level=0" if os.environ["JAX_PLATFORMS"] == "cpu" else ""
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {UNOPTIMISED} {DETERMINISTIC}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
# Thousands of small programs: a second `make test` spares the time to compile them.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["TFDS_DATA_DIR"] = str(CACHE / "tfds")


def pytest_configure(config):
    shards.chosen(config)  # an error here is one line, also with several test processes


@pytest.hookimpl(trylast=True)  # after pytest has deselected what -m and -k say
def pytest_collection_modifyitems(config, items):
    shards.take_shard(config, items)
    shards.longest_files_first(items)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The address of an empty bucket in this process's memory; copies of it lie in `tmp_path`."""
    import fsspec

    from hga_flax.storage import buckets as storage

    system = fsspec.filesystem("memory")
    monkeypatch.setitem(storage.SCHEMES, "s3", ("fsspec", "log in"))
    monkeypatch.setattr(storage.Remote, "_fs", lambda self: system)
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    system.store.clear()
    system.makedirs("/bucket", exist_ok=True)
    return "s3://bucket"


@pytest.fixture
def disk():
    """A file system of two megabytes, where this process may mount one."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs; test_checkpoints.py injects the error too")
        yield pathlib.Path(folder)
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    from tests.training import tiny

    folder = tmp_path_factory.mktemp("trained")
    tiny.train_on_digits(folder)
    return folder


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """The folder of a run of six steps on synthetic images, with checkpoints of two of them; to be copied."""
    from hga_flax.training.trainer import train
    from tests.training import tiny

    folder = tmp_path_factory.mktemp("short")
    train(tiny.config(), str(folder))
    return folder


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """The folder of a small network that was trained on the embedded digits; each file of tests has a copy."""
    return pathlib.Path(shutil.copytree(trained, tmp_path_factory.mktemp("run"), dirs_exist_ok=True))


@pytest.fixture
def short_googlenet(monkeypatch):
    """Leaves two of GoogLeNet's nine blocks, with both max poolings and an auxiliary head."""
    from hga_flax.models import googlenet

    monkeypatch.setattr(googlenet, "BLOCKS", {name: googlenet.BLOCKS[name] for name in ("3b", "4e")})
    monkeypatch.setattr(googlenet, "AUXILIARY_AFTER", {"3b": "auxiliary1"})
