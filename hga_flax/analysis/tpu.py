"""`python -m hga_flax tpu`: the training step compiled for a TPU topology, on a machine without one.

    tpu --config=FILE [--topology=v5e:4x4] [--batch=IMAGES_A_CHIP] [--sweep] [--json] [--config.key=value]

compiles what train.py would run on every chip and prints its memory, FLOPs, memory traffic and
collectives, and the time below which the chip's published limits allow no step. Nothing is run; the
compiler is TPU's own, from the package `libtpu`. `--sweep` looks for the largest batch that fits; near a
chip's memory the compiler may look for hours for what to compute twice, so that it is given up in time.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from hga_flax.command_line import add_config_flags
from hga_flax.config import configure, from_json, to_json, validate
from hga_flax.errors import ConfigError, UserError, one_line

SWEEP_UNIT = 32  # a sweep tries multiples of this many images a chip
SWEEP_LIMIT = 4096  # and none above
COMPILE_LIMIT = 600  # seconds that a sweep waits for one compilation
ACCELERATORS = {"v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}  # what libtpu asks for, by generation
EXAMPLES = 1_281_167  # ImageNet's: the length of the schedule that is compiled, which changes no cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config_flags(parser)
    parser.add_argument("--topology", default="v5e:2x4", help="v5e:2x4 (default), v5e:16x16, v5p:2x2x1, v6e:2x4, ...")
    parser.add_argument("--batch", type=int, help="images a chip (default: training.batch_size over the chips)")
    parser.add_argument("--sweep", action="store_true", help="find the largest batch a chip that fits")
    parser.add_argument(
        "--compile-limit", type=float, default=COMPILE_LIMIT, metavar="SECONDS",
        help="--sweep: a batch whose compilation takes longer counts as one that does not fit (default 600)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result (--sweep: a list of them) as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Compiles and prints.

    Raises:
        UserError: the configuration, the topology or the batch cannot be used, or libtpu is not installed.
    """
    config = validate(configure(arguments.config, arguments.overrides, arguments.recipe))
    if arguments.batch is not None and arguments.batch < 1:
        raise UserError(f"--batch={arguments.batch}: must be positive")
    if not 0 < arguments.compile_limit < float("inf"):
        raise UserError(f"--compile-limit={arguments.compile_limit:g}: must be positive and finite")
    if config.training.accumulation_steps > 1:
        raise UserError(
            f"training.accumulation_steps={config.training.accumulation_steps}: its loop's operations and bytes would "
            "be counted once; set it to 1, and --batch to the images of one part"
        )
    mesh = topology_mesh(arguments.topology)
    log = lambda line: print(line, file=sys.stderr, flush=True)
    if arguments.sweep:
        start = arguments.batch or SWEEP_UNIT
        rows = sweep(config, arguments.topology, mesh.devices.flat[0], start, arguments.compile_limit, log)
        print(json.dumps(rows, indent=2) if arguments.json else sweep_table(rows))
        return
    batch = arguments.batch
    if batch is None:
        batch, rest = divmod(config.training.batch_size, mesh.devices.size)
        if rest:
            raise ConfigError(
                f"training.batch_size={config.training.batch_size}: does not divide over {mesh.devices.size} chips; "
                "name the images a chip with --batch"
            )
    log(f"compiling for {arguments.topology}, {batch} images a chip; this takes minutes ...")
    row = compile_step(config, arguments.topology, mesh, batch)
    if row is None:
        raise UserError(f"--batch={batch}: the step needs more memory than a chip has; try --sweep")
    print(json.dumps(row, indent=2) if arguments.json else table(row))


def topology_mesh(name: str) -> Any:
    """Returns the mesh of a topology's chips, for a compiler that knows them; none of them is here.

    Raises:
        UserError: libtpu is not installed, or there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('the compiler for TPUs is not installed; pip install ".[tpu]", or libtpu alone')
    # Without these libtpu asks the cloud where it runs, and bars other processes that only compile too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", ACCELERATORS.get(name.partition(":")[0], ""))
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from hga_flax.analysis.devices import limits
    from hga_flax.training.mesh import DATA_AXIS

    jax.config.update("jax_platforms", "cpu")
    try:
        with _without_chatter():
            devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # what libtpu raises is no narrower
        raise UserError(
            f"--topology={name}: {one_line(error)[:200]}; write GENERATION:SHAPE, such as v5e:4x4, v5p:2x2x1, v6e:2x4"
        ) from None
    if limits(devices[0]) is None:
        raise UserError(f"--topology={name}: nothing is known of the '{devices[0].device_kind}'; try v5e, v5p or v6e")
    return Mesh(np.asarray(devices), (DATA_AXIS,))


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Within it standard error is dropped: libtpu logs there, from C++, what its exception then says again."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def compile_step(config: Any, topology: str, mesh: Any, batch: int) -> dict[str, Any] | None:
    """Compiles the training step of a configuration for the chips of a mesh.

    Args:
        config: a whole configuration; its batch size is replaced, its compilation cache not used.
        topology: name of the topology, for the report.
        mesh: of the chips, see `topology_mesh`.
        batch: images a chip.

    Returns:
        The row that `--json` prints, all quantities per chip and step, or None where the memory does not suffice.

    Raises:
        UserError: the configuration cannot be run.
    """
    from hga_flax.analysis.compiled import cost

    config = config.copy_and_resolve_references()
    config.training.batch_size = batch * mesh.devices.size
    config.training.compilation_cache = ""  # a program for devices that are not here cannot be read back
    step, state, shapes = training_step(config, mesh)
    start = time.monotonic()
    try:
        compiled = step.trace(state, shapes).lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    measured = cost(compiled)
    row = {"topology": topology, "chips": mesh.devices.size, "batch_per_chip": batch}
    row |= dataclasses.asdict(measured)
    row |= roofline(measured, mesh.devices.flat[0], batch, mesh.devices.size)
    return row | {"compile_s": round(time.monotonic() - start, 1)}


def training_step(config: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """Returns train.py's step for the devices of a mesh, with the shapes of its state and its batch.

    Raises:
        UserError: the configuration cannot be run.
    """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from hga_flax.data.sources import dataset_info
    from hga_flax.training.experiment import configure_process, create_experiment, make_plan
    from hga_flax.training.mesh import DATA_AXIS
    from hga_flax.training.state import abstract_state
    from hga_flax.training.step import make_train_step

    configure_process(config)
    experiment = create_experiment(config, lambda: dataset_info(config.data.name, config.data.dir), mesh=mesh)
    size = config.training.batch_size
    optimizer = experiment.optimizer(experiment.schedule(make_plan(config, max(EXAMPLES, size))))
    state = abstract_state(experiment.init(optimizer), mesh)
    split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    shapes = {"image": ((size, *experiment.image_shape), np.uint8)}
    shapes |= {name: ((size,), np.int32) for name in ("label", "index", "epoch")}
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=split) for name, shape in shapes.items()}
    return make_train_step(experiment.model, optimizer, config, mesh), state, batch


def roofline(measured: Any, device: Any, batch: int, chips: int) -> dict[str, Any]:
    """Returns the least time that a chip's published limits allow for a step, and what sets it.

    Args:
        measured: a `hga_flax.analysis.compiled.Cost`.
        device: a chip.
        batch: images a chip.
        chips: of the topology.
    """
    from hga_flax.analysis.devices import limits

    limit = limits(device)
    exchanged = sum(entry["bytes"] for entry in measured.collectives.values())
    seconds = {
        "compute": measured.flops / limit.flops,
        "memory": measured.bytes_accessed / limit.memory_bandwidth,
        # An all-reduce over a ring or torus sends each value out about twice: reduced, then spread.
        "links": 2 * exchanged * (chips - 1) / chips / limit.link_bandwidth,
    }
    bound = max(seconds, key=seconds.get)
    return {
        "memory_capacity_bytes": int(limit.memory_bytes),
        "seconds": seconds,
        "bound": bound,
        "roofline_s": seconds[bound],
        "images_per_s": batch / seconds[bound],
    }


def largest_fitting(fits: Callable[[int], int | None], capacity: int, start: int, unit: int, limit: int) -> int:
    """Returns the largest multiple of `unit` up to `limit` that fits, or 0.

    Args:
        fits: takes a batch and returns the bytes that it needs, or None where it does not fit.
        capacity: bytes that there are; it guides the search, `fits` decides.
        start: the first batch tried.
        unit: see above.
        limit: see above.
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
        # Memory grows evenly with the batch, more or less: from two points, or from one and the origin.
        points = sorted((units, size) for units, size in known.items() if size is not None)
        (u0, m0), (u1, m1) = ((0, 0), *points)[-2:] if points else ((0, 0), (0, 0))
        guess = int(u0 + (capacity - m0) * (u1 - u0) / max(m1 - m0, 1)) if points else 0
        trial = max(guess, good + 1) if points and guess < bad else (good + bad) // 2
    return good * unit


def sweep(
    config: Any, topology: str, device: Any, start: int, compile_limit: float, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compiles for several batches, each in a process of its own, until it is known which is the largest that fits.

    Args:
        config: a whole configuration.
        topology: see `topology_mesh`.
        device: one of its chips.
        start: the first batch tried.
        compile_limit: seconds; a batch whose compilation takes longer counts as one that does not fit.
        log: takes lines about the progress.

    Returns:
        The rows of `compile_step`, by batch, with `fits`, `given_up` and `largest`.

    Raises:
        UserError: the configuration cannot be run.
    """
    from hga_flax.analysis.devices import limits

    rows = {}

    def fits(batch: int) -> int | None:
        log(f"compiling for {topology}, {batch} images a chip ...")
        done, row = within(compile_limit, _compile_afresh, to_json(config), topology, batch)
        rows[batch] = row or {"topology": topology, "batch_per_chip": batch}
        rows[batch] |= {"fits": row is not None, "given_up": not done}
        if not done:
            log(f"given up after {compile_limit:g} s")
        return None if row is None else row["peak_memory_bytes"]

    largest = largest_fitting(fits, int(limits(device).memory_bytes), start, SWEEP_UNIT, SWEEP_LIMIT)
    return [row | {"largest": batch == largest} for batch, row in sorted(rows.items())]


def _compile_afresh(config: str, topology: str, batch: int) -> dict[str, Any] | None:
    """`compile_step` in a new process."""
    return compile_step(from_json(config), topology, topology_mesh(topology), batch)


def within(seconds: float, function: Callable, *arguments: Any) -> tuple[bool, Any]:
    """Calls a function in a new process: (True, its result), or (False, None) where it takes longer and is killed.

    Raises:
        UserError: the function does, or its process ends without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return False, None
        error, result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(f"the compiler's process ended with code {process.exitcode}; is there memory enough?") from None
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


def table(row: dict[str, Any]) -> str:
    """Returns a row as the lines that a person reads."""
    peak, capacity = row["peak_memory_bytes"], row["memory_capacity_bytes"]
    kinds = [f"{kind} {c['count']} x, {c['bytes'] / 1e6:,.1f} MB" for kind, c in sorted(row["collectives"].items())]
    shares = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in row["seconds"].items())
    lines = [
        ("topology", f"{row['topology']}, {row['chips']} chips, {row['batch_per_chip']} images each"),
        ("memory", f"{peak / 2**30:.2f} of {capacity / 2**30:.0f} GiB ({peak / capacity:.0%})"),
        ("FLOPs", f"{row['flops'] / 1e9:,.4g} G"),
        ("bytes", f"{row['bytes_accessed'] / 1e9:,.4g} GB"),
        ("collectives", "; ".join(kinds) or "none"),
        ("at least", f"{shares}: bound by {row['bound']}"),
        (
            "at most",
            f"{row['images_per_s']:,.0f} images/s a chip, {row['images_per_s'] * row['chips']:,.0f} in all",
        ),
        ("compiled in", f"{row['compile_s']:.0f} s"),
    ]
    return "\n".join(f"{name:12} {text}" for name, text in lines) + "\n(all per chip and step)"


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of a sweep as a table."""
    lines = [f"{'images a chip':>13} {'memory GiB':>11} {'bytes GB':>9} {'images/s a chip, at most':>25}"]
    for row in rows:
        if not row["fits"]:
            reason = "not compiled in time" if row["given_up"] else "does not fit"
            lines.append(f"{row['batch_per_chip']:>13} {reason}")
            continue
        lines.append(
            f"{row['batch_per_chip']:>13} {row['peak_memory_bytes'] / 2**30:>11.2f} "
            f"{row['bytes_accessed'] / 1e9:>9.2f} {row['images_per_s']:>25,.0f}"
            + ("   the largest that fits" if row["largest"] else "")
        )
    return "\n".join(lines)
