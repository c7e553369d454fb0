"""Several processes as one run: detecting them, connecting them, and ending them.

JAX's coordination service runs in process 0, connects the processes and expects heartbeats from each. The processes
are started with flags, or by a launcher: SLURM, Open MPI, Cloud TPU, GKE or a Kubernetes job.

If a process is killed, the others end within `training.lost_process_seconds`: JAX aborts them, or a collective with
the lost process fails first, which gives a one-line error. A process that fails by itself ends at once and skips
JAX's shutdown barrier (`errors.run_main`), which the others would never reach.
"""

import argparse
import contextlib
import glob
import importlib.metadata
import importlib.util
import math
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hga_flax.config.checks import check_keys, config_keys, get_key
from hga_flax.config.command_line import code_in_use, imported_modules
from hga_flax.errors import Interrupted, UserError, leave, one_line
from hga_flax.processes.coordination import LAST_SECONDS, check_alike, global_state, raise_if_lost

FLAGS = ("coordinator", "num_processes", "process_id")
# What may differ between the processes of a run: flags that are compared as what they lead to, flags that only process
# 0 follows, and paths of a machine.
OWN_FLAGS = (*FLAGS, "config", "overrides", "workdir", "data_dir", "json", "profile")
OWN_KEYS = ("data.dir", "data.num_threads", "data.num_workers", "data.cache_mb", "training.compilation_cache")
LIBRARIES = ("jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "opencv-python-headless", "opencv-python")
# JAX's settings that change numbers; JAX_ENABLE_X64 and its like in the environment.
NUMERIC_SETTINGS = ("jax_default_prng_impl", "jax_enable_x64", "jax_threefry_partitionable")
NUMERIC_SETTINGS += ("jax_default_matmul_precision", "jax_numpy_dtype_promotion")
START_TIMEOUT_SECONDS = 300  # for all processes to connect


def _spelled(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that make a command one of several processes."""
    group = parser.add_argument_group("several processes, each with its own devices (else detected: docs/scaling.md)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 and a free port there")
    group.add_argument("--num-processes", "--num_processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", "--process_id", type=int, metavar="I", help="index of this process, from 0")


def launcher(environment: dict[str, str] | os._Environ = os.environ) -> str | None:
    """Returns the name of the launcher that started this process as one of several, or None."""

    def above_one(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    # Tasks of the step, not of the job: a batch script is one process, however many tasks its job may start.
    if above_one("SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in environment:
        return "SLURM"
    if above_one("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU"  # set by GKE and Cloud TPU
    on_tpu_host = bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))
    if on_tpu_host and importlib.util.find_spec("libtpu") and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return "TPU"  # JAX asks the metadata server how many hosts there are
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return "Kubernetes"
    return None


def start(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Connects this process to the others, if there are any; call it before JAX looks for devices.

    Args:
        arguments: parsed arguments, with the flags of `add_flags`.
        config: a complete configuration; `training.lost_process_seconds` is JAX's heartbeat timeout.

    Raises:
        UserError: the configuration is invalid, flags are missing or invalid, the processes cannot connect, or they
            were started with different commands or versions.
    """
    given = {flag: value for flag in FLAGS if (value := getattr(arguments, flag)) is not None}
    by = "flags" if given else launcher()
    if by is None:
        return
    import jax  # imported late: `--help` imports this file, but not JAX

    where = f"found by {by}"
    if given:
        _check(given)
        where = " ".join(f"{_spelled(flag)}={given[flag]}" for flag in FLAGS)
        if given["process_id"] == 0:
            _check_port(given["coordinator"])
        given = {"coordinator_address": given.pop("coordinator"), **given, "cluster_detection_method": "deactivate"}
    check_keys(config)
    jax.config.update("jax_enable_preemption_service", False)  # it takes over SIGTERM, which preemption.py handles
    timeout = math.ceil(config.training.lost_process_seconds)
    try:
        with _deadline(where, "is each started, with its own process id, and can it reach the port of process 0?"):
            jax.distributed.initialize(
                **given,
                initialization_timeout=2 * START_TIMEOUT_SECONDS,  # `_deadline` fires first, because JAX would abort
                heartbeat_timeout_seconds=timeout,
                shutdown_timeout_seconds=timeout,
            )
    except (ValueError, RuntimeError, OSError) as error:
        hint = "" if by == "flags" else "; or give --coordinator, --num-processes and --process-id"
        raise UserError(f"the processes ({where}) cannot be connected: {one_line(error)[:300]}{hint}") from None
    flags = {_spelled(flag): value for flag, value in vars(arguments).items() if flag not in OWN_FLAGS}
    keys = {f"--config.{key}": get_key(config, key) for key in config_keys(config) if key not in OWN_KEYS}
    versions = {"jax": jax.__version__, "hga_flax": code_in_use(), "Python": platform.python_version()}
    versions |= {name: _installed(name) for name in LIBRARIES}
    settings = {name.upper(): getattr(jax.config, name) for name in NUMERIC_SETTINGS}
    settings |= {"the number of processes": global_state().num_processes}
    with _deadline(where, "they are connected, but is one of them of another version, or suspended?"):
        check_alike(flags | keys | {"--import": imported_modules()} | versions | settings)


def _installed(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # OpenCV has several names, of which one is enough
        return "not installed"


@contextlib.contextmanager
def _deadline(where: str, hint: str) -> Iterator[None]:
    """Ends the process with a one-line error if the block takes over START_TIMEOUT_SECONDS, and at once on Ctrl-C.

    If JAX waits in vain, for example because of a mistyped address, it aborts with a stack trace that does not show the
    address; and it waits in C++, where Python does not handle signals.
    """
    reason = f"not all of them came within {START_TIMEOUT_SECONDS} s; {hint}"
    line = f"error: the processes ({where}) cannot be connected: {reason}"
    timer = threading.Timer(START_TIMEOUT_SECONDS, leave, [1, line])
    timer.daemon = True
    main = threading.current_thread() is threading.main_thread()
    handler = main and signal.signal(signal.SIGINT, signal.SIG_DFL)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if main:
            signal.signal(signal.SIGINT, handler)


def _check(given: dict) -> None:
    missing = [_spelled(flag) for flag in FLAGS if flag not in given]
    if missing:
        raise UserError(f"{_spelled(next(iter(given)))}: also needs {' and '.join(missing)}")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={given['coordinator']}: write HOST:PORT, as in 10.0.0.1:1234")
    if given["num_processes"] < 1:
        raise UserError(f"--num-processes={given['num_processes']}: must be at least 1")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(f"--process-id={given['process_id']}: must be 0 to {given['num_processes'] - 1}")


def _check_port(coordinator: str) -> None:
    """Raises a UserError if the port is in use. JAX would crash, or share it with another run, which would abort."""
    if os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):  # one interface only, which JAX alone may know how to read
        return
    port = coordinator.rpartition(":")[2]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection of the run before may still close
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"--coordinator={coordinator}: port {port} of this host cannot be used ({error.strerror}), by another "
                "run, perhaps; choose another"
            ) from None


def union(indices: Iterable[int], limit: int) -> list[int]:
    """Returns the sorted indices that any process has; every process must call this at the same step.

    Args:
        indices: this process's indices, at least 0.
        limit: maximum number of indices per process; any further ones are left out.
    """
    import jax
    from jax.experimental import multihost_utils

    indices = sorted(indices)[:limit]
    if jax.process_count() > 1:
        padded = np.full(limit, -1, np.int32)
        padded[: len(indices)] = indices
        gathered = np.asarray(multihost_utils.process_allgather(padded))
        indices = np.unique(gathered[gathered >= 0]).tolist()
    return indices


def together(config: ConfigDict, work: Callable[[], Any], *, train: bool = True) -> Any:
    """Runs `work` and returns its result; afterwards, the processes of a run shut down JAX together.

    A process in which `work` fails skips the shutdown, because the others do not reach it. Process 0 then stays alive
    for a moment: JAX aborts the others as soon as it is gone, but if all fail alike, each has an error to print.

    Args:
        config: configuration of the run.
        work: function that every process runs.
        train: False if `work` only evaluates, see `create_experiment`.

    Raises:
        UserError: raised by `work`, or the configuration is invalid.
        ProcessLost: another process is gone.
    """
    import jax

    if not jax.distributed.is_initialized():
        return work()
    from hga_flax.processes.settings import configure_process

    configure_process(config, train=train)  # before JAX touches a device
    try:
        result = work()
        jax.distributed.shutdown()
        return result
    except BaseException as error:
        if isinstance(error, Interrupted) and not error.alone:  # all have stopped at the same step, and saved it
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.distributed.shutdown()
            raise
        if global_state().process_id == 0:
            time.sleep(LAST_SECONDS)
        raise_if_lost(error)
        raise
