import os

import jax
import pytest

from hga_flax.processes import settings
from tests.training import tiny


def test_determinism_and_the_cache_are_set_before_jax_starts(monkeypatch, tmp_path):
    cache = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XLA_FLAGS", "--a=b")
    try:
        settings.configure_jax(tiny.config(training__deterministic=False), str(tmp_path))
        assert os.environ["XLA_FLAGS"] == "--a=b" and jax.config.jax_compilation_cache_dir == str(tmp_path)
        settings.configure_jax(tiny.config(), "")
        assert os.environ["XLA_FLAGS"] == "--a=b --xla_gpu_deterministic_ops=true"
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)


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
