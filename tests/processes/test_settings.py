import os
import subprocess
import sys

import jax
import pytest

from hga_flax.errors import ConfigError, UserError
from hga_flax.processes import settings
from tests import commands
from tests.training import tiny


def test_determinism_and_the_cache_are_set_before_jax_starts(monkeypatch, tmp_path):
    cache = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XLA_FLAGS", "--a=b")
    try:
        settings.configure_jax(tiny.config(training__deterministic=False), str(tmp_path))
        assert os.environ["XLA_FLAGS"] == "--a=b" and jax.config.jax_compilation_cache_dir == str(tmp_path)
        settings.configure_jax(tiny.config(), "")
        assert os.environ["XLA_FLAGS"] == "--a=b --xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"
        assert jax.config.jax_compilation_cache_dir is None
        for set_by_hand in ("--xla_gpu_deterministic_ops=false", "--xla_gpu_enable_triton_gemm=true"):
            monkeypatch.setenv("XLA_FLAGS", set_by_hand)
            settings.configure_jax(tiny.config(), "")
            assert set_by_hand in os.environ["XLA_FLAGS"] and "gemm=false" not in os.environ["XLA_FLAGS"]
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)


def test_the_flags_are_the_same_wherever_they_are_named():
    flags = " ".join(settings.DETERMINISTIC_FLAGS)
    assert f'XLA_FLAGS="{flags}"' in (commands.ROOT / "docs" / "library.md").read_text()
    assert flags in os.environ["XLA_FLAGS"]  # of the tests, see tests/conftest.py


@pytest.mark.parametrize("folder", ["/dev/null/xla", "~nobody_here/xla"])
def test_a_cache_that_cannot_be_written_is_no_reason_not_to_train(folder, capfd):
    cache = jax.config.jax_compilation_cache_dir
    settings._warn_once.cache_clear()
    try:
        for _ in range(2):
            settings.configure_process(tiny.config(training__compilation_cache=folder))
            assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: training.compilation_cache={folder}")


@pytest.fixture
def cores(monkeypatch):
    """Six cores, and nothing said about devices."""
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(settings, "available_cores", lambda: 6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4),  # of a batch of 16
        ({"training__batch_size": 12}, 6),
        ({"training__batch_size": 7}, 1),
        ({"training__batch_size": 12, "data__mixup": 0.2}, 6),
        ({"training__batch_size": 6, "data__mixup": 0.2}, 3),  # mixes pairs
        ({"training__batch_size": 12, "training__accumulation_steps": 4}, 3),
        ({"training__batch_size": 12, "evaluation__batch_size": 8}, 4),
        ({"training__batch_norm_scope": "device"}, 1),
        ({"training__cpu_devices": 2}, 2),
        ({"training__cpu_devices": 5}, 5),  # refused later, with a reason
    ],
    ids=str,
)
def test_a_cpu_has_a_device_for_each_core_or_the_most_that_can_share_a_batch(options, expected, cores):
    assert settings.cpu_devices(tiny.config(**{"training__batch_size": 16} | options)) == expected


def test_evaluation_fills_its_batches_so_that_all_cores_have_a_device(cores):
    assert settings.cpu_devices(tiny.config(training__batch_size=7, training__cpu_devices=0), train=False) == 6


def test_a_number_of_devices_that_is_set_elsewhere_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert settings.cpu_devices(tiny.config(training__cpu_devices=0)) == 0
    assert settings.cpu_devices(tiny.config(training__cpu_devices=8)) == 0
    assert settings.cpu_devices(tiny.config(training__cpu_devices=3), train=False) == 0  # a run from elsewhere
    with pytest.raises(
        ConfigError, match=r"training\.cpu_devices=3: XLA_FLAGS, .* asks for 8 CPU device\(s\); set only"
    ):
        settings.cpu_devices(tiny.config(training__cpu_devices=3))


def test_training_in_64_bits_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(settings, "configure_jax", lambda *arguments: None)
    with jax.enable_x64(True):
        with pytest.raises(UserError, match="JAX_ENABLE_X64 is set, but training keeps its state in float32; unset it"):
            settings.configure_process(tiny.config())
        settings.configure_process(tiny.config(), train=False)


@pytest.mark.medium
@pytest.mark.parametrize(("variables", "expected"), [({}, 3), ({"JAX_NUM_CPU_DEVICES": "2"}, 2)], ids=str)
def test_jax_has_that_many_devices(variables, expected):
    code = (
        "import jax; from hga_flax.processes import settings; from tests.training import tiny; "
        "settings.available_cores = lambda: 3; settings.use_cores(tiny.config(training__batch_size=12)); "
        "settings.use_cores(tiny.config()); print(jax.device_count())"
    )
    environment = {name: value for name, value in commands.environment().items() if name != "XLA_FLAGS"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=commands.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(expected)], done.stderr
