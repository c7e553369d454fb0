"""Eight CPU devices for every test, and a compilation cache that the whole suite shares."""

import os
import pathlib

CACHE = pathlib.Path(__file__).parent.parent / ".cache"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["TFDS_DATA_DIR"] = str(CACHE / "tfds")
