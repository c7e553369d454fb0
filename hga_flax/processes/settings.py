"""Process-wide settings that a command makes before JAX touches a device."""

import functools
import logging
import os
import sys

import jax
from ml_collections import ConfigDict

from hga_flax.config.checks import check_keys
from hga_flax.config.loading import validate
from hga_flax.errors import UserError, check_writable, expand

CACHE_KEY = "training.compilation_cache"
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"


def configure_jax(config: ConfigDict, cache: str) -> None:
    """Sets determinism and the folder of compiled steps ("" for none); call it before JAX touches a device."""
    if config.training.deterministic and DETERMINISTIC_FLAG.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAG}".strip()
    jax.config.update("jax_compilation_cache_dir", str(expand(cache, CACHE_KEY)) if cache else None)


def configure_process(config: ConfigDict, *, train: bool = True) -> None:
    """Checks what needs no device and makes the process-wide settings, see `configure_jax`; only for commands.

    The library leaves its caller's flags, caches and loggers as they are.

    Raises:
        UserError: the configuration cannot be run here.
    """
    # Errors are raised and reported once; Orbax would print their tracebacks as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    configure_jax(config, check_configuration(config, train=train))


def check_configuration(config: ConfigDict, *, train: bool = True) -> str:
    """Checks what needs no device; see `hga_flax.training.experiment.create_experiment`.

    Returns:
        The folder of compiled steps if it is usable here, else "".

    Raises:
        UserError: the configuration cannot be run here.
    """
    if train:
        validate(config)
    else:
        check_keys(config)
    return _writable_cache(config.training.compilation_cache, warn=train)


def _writable_cache(folder: str, *, warn: bool) -> str:
    """Returns the folder of compiled steps, or "" if it is not writable, which must not prevent training."""
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
