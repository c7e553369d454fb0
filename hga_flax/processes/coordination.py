"""What the processes of a run tell each other through JAX's coordination service, outside the compiled programs.

They wait for each other, compare what must be the same in all of them, and recognise when one is gone.
"""

import collections
import contextlib
import json
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hga_flax.errors import UserError, one_line

BARRIER_TIMEOUT_SECONDS = 3600  # includes work; JAX's heartbeats detect a lost process earlier
LAST_SECONDS = 2.0  # before process 0 ends with an error: JAX aborts the others then, and each has one to print
LONGEST = 100  # characters of a value in an error
# JAX's errors when another process is gone: a status, then a text that names Gloo (CPU), NCCL (NVIDIA) or the service.
LOST = re.compile(
    r"[A-Z_]+: .*(gloo|nccl|coordination ?service|heartbeat|barrier|connection (closed|reset|refused))",
    re.IGNORECASE | re.DOTALL,
)
ALIKE = "alike"
_barriers: collections.Counter[str] = collections.Counter()  # JAX needs a new name each time


class ProcessLost(UserError):
    """Another process of the run was lost or failed."""


def raise_if_lost(error: BaseException) -> None:
    """Raises `ProcessLost` if an error comes from JAX because another process is gone."""
    import jax

    cause: BaseException | None = error
    while cause is not None and jax.distributed.is_initialized():
        # A JaxRuntimeError, or a ValueError if a collective fails while it is dispatched.
        if isinstance(cause, (RuntimeError, ValueError)) and LOST.match(str(cause)):
            raise ProcessLost(
                f"another process was lost or failed ({one_line(cause)[:200]}); the checkpoints written before are "
                "kept; start all processes again with the same command"
            ) from error
        cause = cause.__cause__ or cause.__context__


def global_state() -> Any:
    """Returns the state of JAX's coordination service, the only private name of JAX that this project uses."""
    from jax._src.distributed import global_state

    return global_state


def barrier(name: str) -> None:
    """Waits until all processes are here, for an hour at most; all must call their barriers in the same order.

    JAX's public barriers are collectives, which on CPUs (Gloo) fail unless all processes start them within half a
    minute. One process may take longer than another to compile, or to copy from a bucket.

    Args:
        name: what the processes wait for, as in "the training step is compiled".

    Raises:
        UserError: some processes do not arrive in time.
    """
    import jax

    if jax.process_count() == 1:
        return
    _barriers[name] += 1
    with _waiting(name):
        global_state().client.wait_at_barrier(f"{name} {_barriers[name]}", BARRIER_TIMEOUT_SECONDS * 1000)


@contextlib.contextmanager
def _waiting(until: str) -> Iterator[None]:
    """Raises a UserError where the others do not arrive within BARRIER_TIMEOUT_SECONDS."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise_if_lost(error)
            raise
        raise UserError(
            f"waited {BARRIER_TIMEOUT_SECONDS} s for the other processes, until {until}; are they still running?"
        ) from None


def check_alike(facts: Mapping[str, Any]) -> None:
    """Compares the processes of a run; every process must call it at the same place.

    Without it, processes with other learning rates, seeds or data train together, and each has other weights.

    Args:
        facts: what has to be the same in all processes, by name.

    Raises:
        UserError: a process has another value; all processes raise the same error.
    """
    state = global_state()
    if state.client is None or (state.num_processes or 1) == 1:
        return

    def read(name: str) -> str:
        with _waiting("they are compared"):
            return state.client.blocking_key_value_get(f"{place}/{name}", BARRIER_TIMEOUT_SECONDS * 1000)

    _barriers["alike"] += 1
    place = f"hga_flax/alike/{_barriers['alike']}"
    write = lambda name, text: state.client.key_value_set(f"{place}/{name}", text)
    own = {name: str(value) for name, value in facts.items()}
    if state.process_id == 0:
        write("facts", json.dumps(own))
    first = json.loads(read("facts"))
    other = next((name for name in {**first, **own} if first.get(name) != own.get(name)), None)
    ours, theirs = _cut(own.get(other)), _cut(first.get(other))
    found = f"{other} is {ours} in process {state.process_id}, and {theirs} in process 0"
    write(f"found/{state.process_id}", ALIKE if other is None else found)
    if state.process_id == 0:
        all_found = [read(f"found/{process}") for process in range(state.num_processes)]
        write("verdict", next((found for found in all_found if found != ALIKE), ALIKE))
    if (verdict := read("verdict")) != ALIKE:
        if state.process_id == 0:
            time.sleep(LAST_SECONDS)
        raise UserError(f"the processes of a run need the same command, data and versions: {verdict}")


def _cut(value: str | None) -> str:
    return "not given" if value is None else value if len(value) <= LONGEST else f"{value[:LONGEST]}..."


def check_same_arrays(what: str, tree: Any) -> None:
    """Compares arrays that each process has read by itself; every process must call it at the same place.

    Args:
        what: the arrays' name in the error.
        tree: the arrays, of NumPy or replicated on all devices.

    Raises:
        UserError: a process has other arrays; all processes raise the same error.
    """
    import jax

    if jax.process_count() == 1:
        return
    checksum = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), zlib.crc32(str(path).encode(), checksum))
    check_alike({what: f"arrays with checksum {checksum:08x}"})
