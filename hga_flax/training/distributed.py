"""Several processes as one run: who they are, how they find each other, and what happens when one is lost.

JAX's own service connects the processes and watches over them. It is started from flags or where a
launcher says that there are several: SLURM, Open MPI, Cloud TPU, GKE or a Kubernetes job.
"""

import argparse
import collections
import contextlib
import glob
import importlib.util
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hga_flax.errors import UserError, one_line
from hga_flax.training.relay import Relay
from hga_flax.validation import check_keys

FLAGS = ("coordinator", "num_processes", "process_id")
START_TIMEOUT_SECONDS = 300  # until all processes have come
MEETING_TIMEOUT_SECONDS = 3600  # a lost process is noticed before, by watch.py
_meetings: collections.Counter[str] = collections.Counter()  # a barrier's name serves once


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that make a command one of several processes."""
    group = parser.add_argument_group("several processes, each with its own devices (else detected: docs/scaling.md)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")


def launcher(environment: dict[str, str] | os._Environ = os.environ) -> str | None:
    """Returns the name of the launcher that started this process as one of several, None if there is none."""

    def above_one(name: str) -> bool:
        return environment.get(name, "").isdecimal() and int(environment[name]) > 1

    # Of the step, not of the job: a batch script is one process, however many tasks its job may start.
    if above_one("SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in environment:
        return "SLURM"
    if above_one("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU"  # GKE and Cloud TPU say so
    on_tpu_host = bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))
    if on_tpu_host and importlib.util.find_spec("libtpu") and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return "TPU"  # JAX asks the machine's metadata how many hosts there are
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return "Kubernetes"
    return None


def start(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Connects this process with the others, if there are others; before JAX touches a device.

    Args:
        arguments: with the flags of `add_flags`.
        config: a whole configuration, which says for how long a process may be silent.

    Raises:
        UserError: the configuration is wrong, or some flags are missing or wrong, or the others cannot be reached.
    """
    given = {flag: value for flag in FLAGS if (value := getattr(arguments, flag)) is not None}
    by = "flags" if given else launcher()
    if by is None:
        return
    import jax  # here: a command's --help asks for its flags

    if given:
        _check(given)
        if given["process_id"]:
            _wait_for(given["coordinator"])
        given = {"coordinator_address": given.pop("coordinator"), **given, "cluster_detection_method": "deactivate"}
    check_keys(config)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself; preemption.py handles it
    # Its service would end the others with a stack trace when one is lost: watch.py does that with a line, and
    # JAX's own sign of life comes second.
    jax.config.update("jax_enable_recoverability", True)
    timeout = math.ceil(config.training.lost_process_seconds)
    try:
        with _deadline(f"the processes (found by {by})"), _relayed():
            jax.distributed.initialize(
                **given,
                initialization_timeout=10 * START_TIMEOUT_SECONDS,  # JAX ends it by an abort, so ours comes first
                heartbeat_timeout_seconds=2 * timeout,
                shutdown_timeout_seconds=timeout,
            )
    except (ValueError, RuntimeError, OSError) as error:
        hint = "" if by == "flags" else "; or give --coordinator, --num_processes and --process_id"
        raise UserError(f"the processes (found by {by}) cannot be connected: {one_line(error)[:300]}{hint}") from None


@contextlib.contextmanager
def _deadline(what: str) -> Iterator[None]:
    """Ends this process with one line, or at once by Ctrl-C, where what is inside waits in vain for the others."""
    from hga_flax.training.watch import leave

    line = f"{what} cannot be connected: not all have come within {START_TIMEOUT_SECONDS} s; is every one started?"
    timer = threading.Timer(START_TIMEOUT_SECONDS, leave, [line])
    timer.daemon = True
    main = threading.current_thread() is threading.main_thread()
    handler = main and signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's would wait for what is inside
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if main:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _relayed() -> Iterator[None]:
    """Within it JAX's client is one that connects to process 0 through a relay; see relay.py."""
    from jax._src import distributed as internals  # the address that a launcher gives is nowhere public

    create = getattr(getattr(internals, "_jax", None), "get_distributed_runtime_client", None)
    if create is None:  # a JAX that we do not know: the loss of process 0 will also be told by its abort
        yield
        return

    def create_relayed(address: str, process: int, **options: Any) -> Any:
        return create(Relay(address, _process_0_lost).address if process else address, process, **options)

    internals._jax.get_distributed_runtime_client = create_relayed
    try:
        yield
    finally:
        internals._jax.get_distributed_runtime_client = create


def _process_0_lost() -> None:
    """Ends this process, unless its watch or itself is about to do so."""
    import jax

    from hga_flax.training.watch import AFTER, CLOSED, CONCLUSION_SECONDS, leave

    time.sleep(CONCLUSION_SECONDS)
    if jax.distributed.is_initialized():
        leave(f"process 0 was lost ({CLOSED}); {AFTER}")


def _wait_for(address: str) -> None:
    """Waits until process 0 listens; JAX would end this process by an abort if it never does."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={address}: process 0 cannot be reached there within {START_TIMEOUT_SECONDS} s "
                    f"({error.strerror or one_line(error)}); is it started, and is the port open?"
                ) from None
            time.sleep(0.5)


def _check(given: dict) -> None:
    missing = [f"--{flag}" for flag in FLAGS if flag not in given]
    if missing:
        raise UserError(f"--{next(iter(given))}: also needs {' and '.join(missing)}")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={given['coordinator']}: write HOST:PORT, as in 10.0.0.1:1234")
    if given["num_processes"] < 1:
        raise UserError(f"--num_processes={given['num_processes']}: must be at least 1")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(f"--process_id={given['process_id']}: must be 0 to {given['num_processes'] - 1}")


def union(indices: Iterable[int], limit: int) -> list[int]:
    """Returns the indices that any process has, sorted; every process must call this at the same step.

    Args:
        indices: this process's, at least 0.
        limit: how many one process has at most.
    """
    import jax
    from jax.experimental import multihost_utils

    indices = sorted(indices)
    if jax.process_count() > 1:
        padded = np.full(limit, -1, np.int32)
        padded[: len(indices)] = indices
        gathered = np.asarray(multihost_utils.process_allgather(padded))
        indices = np.unique(gathered[gathered >= 0]).tolist()
    return indices


def meet(name: str) -> None:
    """Waits until all processes are here, up to an hour; all meet in the same order.

    A collective is started by all within half a minute on CPUs, or it fails (Gloo); compiling before may
    take one process longer than another, and so may copying from a bucket.

    Args:
        name: what they wait for, as in "the training step is compiled".

    Raises:
        UserError: some do not come in time.
    """
    import jax

    if jax.process_count() > 1:
        from jax._src.distributed import global_state  # nowhere public; a collective would be what this is to avoid

        _meetings[name] += 1
        try:
            global_state.client.wait_at_barrier(f"{name} {_meetings[name]}", MEETING_TIMEOUT_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise UserError(
                f"waited {MEETING_TIMEOUT_SECONDS} s for the other processes, until {name}; are they at work?"
            ) from None


def together(config: ConfigDict, work: Callable[[], Any], *, train: bool = True) -> Any:
    """Returns what `work` returns; where several processes do it together they watch each other.

    Args:
        config: of the run.
        work: what all do.
        train: False where it only evaluates, see `create_experiment`.

    Raises:
        UserError: as `work` does, or the configuration is wrong.
    """
    import jax

    if not jax.distributed.is_initialized():
        return work()
    from hga_flax.training.experiment import configure_process
    from hga_flax.training.watch import Watch

    configure_process(config, train=train)  # before the first device is touched
    process, processes, disconnect = jax.process_index(), jax.process_count(), jax.distributed.shutdown
    with Watch(process, processes, config.training.lost_process_seconds, disconnect=disconnect):
        return work()
