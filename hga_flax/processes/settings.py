"""Process-wide settings that a command makes before JAX touches a device."""

import contextlib
import functools
import logging
import os
import re
import sys

import jax
from ml_collections import ConfigDict

from hga_flax.config.checks import check_keys
from hga_flax.config.loading import validate
from hga_flax.data.pipeline import available_cores
from hga_flax.errors import ConfigError, UserError, check_writable, expand
from hga_flax.processes.mesh import most_devices

CACHE_KEY = "training.compilation_cache"
FORCED_DEVICES = "xla_force_host_platform_device_count"
# With deterministic operations XLA does not autotune. From jax 0.11 on it then compiles all small products with Triton,
# and fails if Triton cannot compile one (seen on an H200 with jax 0.11.2). cuBLAS takes all, and is deterministic too.
DETERMINISTIC_FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm=false")


def configure_jax(config: ConfigDict, cache: str) -> None:
    """Sets determinism and the compilation cache's folder ("" for none); call it before JAX touches a device."""
    flags = os.environ.get("XLA_FLAGS", "")
    if config.training.deterministic and DETERMINISTIC_FLAGS[0].split("=")[0] not in flags:
        added = [flag for flag in DETERMINISTIC_FLAGS if flag.split("=")[0] not in flags]
        os.environ["XLA_FLAGS"] = " ".join([*filter(None, [flags]), *added])
    jax.config.update("jax_compilation_cache_dir", str(expand(cache, CACHE_KEY)) if cache else None)


def use_cores(config: ConfigDict, *, train: bool = True) -> None:
    """Sets the number of CPU devices, see `cpu_devices`; call it before JAX touches a device."""
    if devices := cpu_devices(config, train=train):
        with contextlib.suppress(RuntimeError):  # raised if JAX has its devices already
            jax.config.update("jax_num_cpu_devices", devices)


def cpu_devices(config: ConfigDict, *, train: bool = True) -> int:
    """Returns how many devices are to share the CPU's cores: `training.cpu_devices`, or by default one per core.

    XLA makes poor use of several cores for one device: two devices on two cores train 1.1 to 2 times as fast as one.
    Results change only by rounding, except that each device draws its own dropout.

    Returns:
        The number, or 0 if XLA_FLAGS, JAX_NUM_CPU_DEVICES or the caller has set one, which is then kept.

    Raises:
        ConfigError: `training.cpu_devices` contradicts that number.
    """
    asked, training = config.training.cpu_devices, config.training
    forced = re.search(rf"{FORCED_DEVICES}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if present := int(forced[1]) if forced else max(0, jax.config.jax_num_cpu_devices):
        if train and asked not in (0, present):
            raise ConfigError(
                f"training.cpu_devices={asked}: XLA_FLAGS, JAX_NUM_CPU_DEVICES or a study (its key `devices`, 1 if "
                f"it is not set) asks for {present} CPU device(s); set only one of them, in a study `devices`"
            )
        return 0
    if asked:
        return asked
    if jax.distributed.is_initialized():
        return 1  # how many processes share the cores is unknown
    if train and training.batch_norm_scope == "device" and not training.freeze_batch_stats:
        return 1  # a device's part of the batch has its own statistics: more devices would train another network
    return most_devices(config, available_cores()) if train else available_cores()


def configure_process(config: ConfigDict, *, train: bool = True) -> None:
    """Checks what can be checked without a device and makes the process-wide settings; only for commands.

    The library leaves its caller's flags, caches and loggers as they are.

    Raises:
        UserError: the configuration cannot be run here.
    """
    if train and jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is set, but training keeps its state in float32; unset it")
    # Errors are raised and reported once; Orbax would print their tracebacks as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    configure_jax(config, check_configuration(config, train=train))
    use_cores(config, train=train)


def check_configuration(config: ConfigDict, *, train: bool = True) -> str:
    """Checks what can be checked without a device; see `hga_flax.training.experiment.create_experiment`.

    Returns:
        The compilation cache's folder if it is usable here, else "".

    Raises:
        UserError: the configuration cannot be run here.
    """
    if train:
        validate(config)
    else:
        check_keys(config)
    return _writable_cache(config.training.compilation_cache, warn=train)


def _writable_cache(folder: str, *, warn: bool) -> str:
    """Returns the compilation cache's folder, or "" if it is not writable, which must not prevent training."""
    if not folder or "://" in folder:
        return str(expand(folder, CACHE_KEY)) if folder and warn else ""
    try:
        check_writable(expand(folder, CACHE_KEY), CACHE_KEY, "the steps compiled here are not kept")
    except UserError as error:
        if warn:
            _warn_once(f"warning: {error}")
        return ""
    return folder


@functools.cache
def _warn_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
