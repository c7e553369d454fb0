"""`python -m hga_flax compile --sweep`: finds the largest batch per device that fits."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from hga_flax.bench.topologies import topology_mesh
from hga_flax.config.command_line import import_module, imported_modules
from hga_flax.config.loading import from_json, to_json
from hga_flax.errors import UserError

SWEEP_UNIT = 32  # a sweep tries multiples of this many images per device
SWEEP_LIMIT = 4096  # largest batch tried
LONGEST_POLL = 2e6  # seconds; the system takes milliseconds, as an int32


def largest_fitting(fits: Callable[[int], int | None], capacity: int, start: int, unit: int, limit: int) -> int:
    """Returns the largest multiple of `unit` up to `limit` that fits, or 0.

    Args:
        fits: takes a batch and returns the bytes it needs, or None if it does not fit.
        capacity: available bytes; they only guide the search, `fits` decides.
        start: first batch to try.
        unit: granularity of the search.
        limit: largest batch to try.
    """
    known: dict[int, int | None] = {}
    good, bad = 0, limit // unit + 1  # in units; the answer lies in [good, bad)
    trial = min(max(1, -(-start // unit)), bad - 1)
    while bad - good > 1:
        known[trial] = fits(trial * unit)
        if known[trial] is None:
            bad = trial
        else:
            good = trial
        # Memory is roughly linear in the batch: extrapolate from two points, or from one and the origin.
        points = sorted((units, size) for units, size in known.items() if size is not None)
        (u0, m0), (u1, m1) = ((0, 0), *points)[-2:] if points else ((0, 0), (0, 0))
        guess = int(u0 + (capacity - m0) * (u1 - u0) / max(m1 - m0, 1)) if points else 0
        trial = max(guess, good + 1) if points and guess < bad else (good + bad) // 2
    return good * unit


def sweep(
    config: Any, topology: str, device: Any, start: int, compile_limit: float, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compiles several batch sizes, each in its own process, to find the largest that fits.

    Args:
        config: a complete configuration.
        topology: name of the topology, see `topology_mesh`.
        device: one chip of the topology.
        start: first batch to try.
        compile_limit: time limit in seconds; a batch that takes longer to compile counts as not fitting.
        log: called with progress lines.

    Returns:
        The rows of `compile_step`, sorted by batch, with `fits`, `given_up` and `largest` added.

    Raises:
        UserError: the configuration cannot be run.
    """
    from hga_flax.counting.devices import limits

    rows = {}

    def fits(batch: int) -> int | None:
        log(f"compiling for {topology}, {batch} images per chip ...")
        done, row = within(compile_limit, _compile_afresh, imported_modules(), to_json(config), topology, batch)
        rows[batch] = row or {"topology": topology, "batch_per_chip": batch}
        # The GPU compiler does not reject a step that exceeds the memory.
        fitting = row is not None and row["peak_memory_bytes"] <= row["memory_capacity_bytes"]
        rows[batch] |= {"fits": fitting, "given_up": not done}
        if not done:
            log(f"given up after {compile_limit:g} s")
        return row["peak_memory_bytes"] if rows[batch]["fits"] else None

    largest = largest_fitting(fits, int(limits(device).memory_bytes), start, SWEEP_UNIT, SWEEP_LIMIT)
    return [row | {"largest": batch == largest} for batch, row in sorted(rows.items())]


def _compile_afresh(modules: list[str], config: str, topology: str, batch: int) -> dict[str, Any] | None:
    """Calls `compile_step` in the new process."""
    from hga_flax.bench.compiled_step import compile_step

    for name in modules:
        import_module(name)
    mesh, platform = topology_mesh(topology)
    return compile_step(from_json(config), topology, mesh, platform, batch)


def within(seconds: float, function: Callable, *arguments: Any) -> tuple[bool, Any]:
    """Calls a function in a new process; returns (True, result), or (False, None) if it was killed after `seconds`.

    Raises:
        UserError: the function raised it, or the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(min(seconds, LONGEST_POLL)):
            return False, None
        error, result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(f"the compiler's process ended with code {process.exitcode}; is there enough memory?") from None
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return True, result


def _send(sender: Connection, function: Callable, arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((None, function(*arguments)))
    except UserError as error:
        sender.send((error, None))


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of a sweep as a table."""
    lines = [f"{'images/chip':>13} {'memory GiB':>11} {'bytes GB':>9} {'images/s/chip, at most':>25}"]
    for row in rows:
        if not row["fits"]:
            reason = "not compiled in time" if row["given_up"] else "does not fit"
            lines.append(f"{row['batch_per_chip']:>13} {reason}")
            continue
        lines.append(
            f"{row['batch_per_chip']:>13} {row['peak_memory_bytes'] / 2**30:>11.2f} "
            f"{row['main_memory_bytes'] / 1e9:>9.2f} {row['images_per_s']:>25,.0f}"
            + ("   the largest that fits" if row["largest"] else "")
        )
    return "\n".join(lines)
