"""What a command sets for its whole process before JAX touches a device."""

import functools
import logging
import os
import sys

import jax
from ml_collections import ConfigDict

from hga_flax.config.loading import validate
from hga_flax.config.rules import check_keys
from hga_flax.errors import UserError, check_writable, expand

CACHE_KEY = "training.compilation_cache"
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"


def configure_jax(config: ConfigDict, cache: str) -> None:
    """Sets what must be set before JAX touches a device: determinism and the folder of compiled steps, "" for none."""
    if config.training.deterministic and DETERMINISTIC_FLAG.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_FLAG}".strip()
    jax.config.update("jax_compilation_cache_dir", str(expand(cache, CACHE_KEY)) if cache else None)


def configure_process(config: ConfigDict, *, train: bool = True) -> None:
    """Checks what needs no device and sets what is the whole process's, for commands alone; see `configure_jax`.

    The library leaves flags, caches and loggers as its caller has them.

    Raises:
        UserError: the configuration cannot be run here.
    """
    # What goes wrong is raised, and said once; Orbax would print its traceback beside that.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    configure_jax(config, check_configuration(config, train=train))


def check_configuration(config: ConfigDict, *, train: bool = True) -> str:
    """Checks what needs no device; see `hga_flax.training.experiment.create_experiment`.

    Returns:
        The folder of compiled steps that can be used here, "" for none.

    Raises:
        UserError: the configuration cannot be run here.
    """
    if train:
        validate(config)
    else:
        check_keys(config)
    return _writable_cache(config.training.compilation_cache, warn=train)


def _writable_cache(folder: str, *, warn: bool) -> str:
    """Returns the folder of compiled steps, "" where it cannot be written to: no reason not to train."""
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
