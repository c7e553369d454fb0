"""`python -m hga_flax compile`: compiles the training step for absent accelerators and reports its costs.

    compile --config=FILE [--topology=h100|h100:8|v5e:2x4|...] [--batch=IMAGES_PER_DEVICE] [--compare=none,se,hga]
            [--top=20] [--sweep] [--json] [--config.key=value]

compiles what train.py would run on every device and prints its memory, FLOPs, memory traffic, kernels and
collectives, and the shortest step time that the device's published limits allow. Nothing is run. The compilers
are the accelerators' own: libtpu for TPUs, the package jax-cuda12-pjrt for NVIDIA GPUs. Without a GPU, the latter
cannot autotune: bytes, kernels and memory are right, but a real run may choose other convolution algorithms from
the library. `program_text.py` counts the bytes and FLOPs for GPUs. `--sweep` searches for the largest batch that
fits. Each of its compilations has a time limit because, near a TPU's memory limit, the compiler may spend hours
deciding what to rematerialise.
"""

import argparse
import json
import sys
from typing import Any

from hga_flax.bench.compiled_step import compile_step
from hga_flax.bench.sweep import SWEEP_UNIT, sweep, sweep_table
from hga_flax.bench.topologies import EXAMPLES, topology_mesh
from hga_flax.config.command_line import add_config_flags, add_import_flag
from hga_flax.config.loading import configure, validate
from hga_flax.errors import ConfigError, UserError

COMPILE_LIMIT = 600  # time limit in seconds for each compilation of a sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config_flags(parser)
    add_import_flag(parser)
    parser.add_argument(
        "--topology", default="v5e:2x4", help=f"accelerators to compile for, for example {EXAMPLES} (default: v5e:2x4)"
    )
    parser.add_argument("--batch", type=int, help="batch size per device (default: training.batch_size / devices)")
    parser.add_argument(
        "--compare", metavar="NAMES", help="attentions to compile in turn and compare, for example none,se,hga"
    )
    parser.add_argument("--top", type=int, metavar="N", help="list the N kernels that move the most bytes")
    parser.add_argument(
        "--sweep", action="store_true", help="find the largest batch size per device that fits into memory"
    )
    parser.add_argument(
        "--compile-limit", type=float, default=COMPILE_LIMIT, metavar="SECONDS",
        help="--sweep: a batch size that takes longer to compile counts as too large (default: 600)",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print the result (--sweep, --compare: a list of them) as JSON"
    )


def run(arguments: argparse.Namespace) -> None:
    """Compiles and prints.

    Raises:
        UserError: the configuration, the topology or the batch cannot be used, or the compiler is not installed.
    """
    configs = _check(arguments)
    mesh, platform = topology_mesh(arguments.topology)
    log = lambda line: print(line, file=sys.stderr, flush=True)
    if arguments.sweep:
        start = arguments.batch or SWEEP_UNIT
        rows = sweep(configs[0], arguments.topology, mesh.devices.flat[0], start, arguments.compile_limit, log)
        print(json.dumps(rows, indent=2) if arguments.json else sweep_table(rows))
        return
    batch = arguments.batch
    if batch is None:
        batch, rest = divmod(configs[0].training.batch_size, mesh.devices.size)
        if rest:
            raise ConfigError(
                f"training.batch_size={configs[0].training.batch_size}: does not divide over {mesh.devices.size} "
                "devices; give the number of images per device with --batch"
            )
    rows = []
    for config in configs:
        log(
            f"compiling {config.model.name} with {config.model.attention} for {arguments.topology}, {batch} images per "
            "device; this takes minutes ..."
        )
        row = compile_step(config, arguments.topology, mesh, platform, batch, arguments.top or 0)
        if row is None:
            raise UserError(f"--batch={batch}: the step needs more memory than a device has; try --sweep")
        rows.append(row)
    if arguments.json:
        print(json.dumps(rows if arguments.compare is not None else rows[0], indent=2))
        return
    print(comparison(rows) if arguments.compare is not None else table(rows[0]))
    if arguments.top:
        print(*(top_kernels(row) for row in rows), sep="\n")


def _check(arguments: argparse.Namespace) -> list[Any]:
    """Checks the arguments without a compiler; returns the configurations to compile, one per attention."""
    configs = [validate(configure(arguments.config, arguments.overrides, arguments.recipe))]
    if arguments.compare is not None:
        if arguments.sweep:
            raise UserError("--compare and --sweep: choose one")
        names = [name.strip() for name in arguments.compare.split(",")]
        overrides = lambda name: [*arguments.overrides, f"--config.model.attention={name}"]
        configs = [validate(configure(arguments.config, overrides(name), arguments.recipe)) for name in names]
    for option in ("batch", "top"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}={value}: must be positive")
    if arguments.top and arguments.sweep:
        raise UserError("--top and --sweep: choose one; a sweep compiles many programs")
    if not 0 < arguments.compile_limit < float("inf"):
        raise UserError(f"--compile-limit={arguments.compile_limit:g}: must be positive and finite")
    if (parts := configs[0].training.accumulation_steps) > 1:
        raise UserError(
            f"training.accumulation_steps={parts}: its loop's operations and bytes would "
            "be counted once; set it to 1, and --batch to the images of one part"
        )
    return configs


def _lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the printed (name, text) lines of a row."""
    peak, capacity = row["peak_memory_bytes"], row["memory_capacity_bytes"]
    kinds = [f"{kind} {c['count']} x, {c['bytes'] / 1e6:,.1f} MB" for kind, c in sorted(row["collectives"].items())]
    calls = [f"{target} {count} x" for target, count in sorted(row["custom_calls"].items())]
    shares = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in row["seconds"].items())
    over = "" if peak <= capacity else ": does not fit"
    return [
        ("memory", f"{peak / 2**30:.2f} of {capacity / 2**30:.0f} GiB ({peak / capacity:.0%}){over}"),
        ("FLOPs", f"{row['flops'] / 1e9:,.4g} G"),
        (
            "bytes",
            f"{row['main_memory_bytes'] / 1e9:,.4g} GB to and from main memory; {row['bytes_accessed'] / 1e9:,.4g} GB "
            "accessed, on-chip memory included",
        ),
        ("kernels", f"{row['kernels']:,}, {row['small_kernels']:,} of them under 1 MB"),
        ("calls", "; ".join(calls) or "none"),
        ("collectives", "; ".join(kinds) or "none"),
        ("at least", f"{shares}: bound by {row['bound']}"),
        (
            "at most",
            f"{row['images_per_s']:,.0f} images/s per device, {row['images_per_s'] * row['chips']:,.0f} in total",
        ),
        ("compiled in", f"{row['compile_s']:.0f} s"),
    ]


def _what(row: dict[str, Any]) -> str:
    return f"{row['topology']}, {row['chips']} device(s), {row['batch_per_chip']} images each"


def table(row: dict[str, Any]) -> str:
    """Returns a row as printable lines."""
    lines = [("topology", _what(row)), ("network", f"{row['model']} with {row['attention']}"), *_lines(row)]
    return "\n".join(f"{name:12} {text}" for name, text in lines) + "\n(all per device and step)"


def comparison(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of several attentions as a table, with ratios to the first."""
    first = rows[0]
    lines = [
        f"{first['model']} on {_what(first)}",
        f"{'attention':12} {'GB':>8} {'ratio':>6} {'accessed GB':>12} {'ratio':>6} {'GFLOPs':>9} {'memory GiB':>11} "
        f"{'kernels':>8} {'< 1 MB':>7} {'exchanged MB':>13} {'at least ms':>12} {'bound by':>8} {'images/s':>9}",
    ]
    for row in rows:
        exchanged = sum(entry["bytes"] for entry in row["collectives"].values())
        lines.append(
            f"{row['attention']:12} {row['main_memory_bytes'] / 1e9:>8.2f} "
            f"{row['main_memory_bytes'] / first['main_memory_bytes']:>6.3f} {row['bytes_accessed'] / 1e9:>12.2f} "
            f"{row['bytes_accessed'] / first['bytes_accessed']:>6.3f} {row['flops'] / 1e9:>9,.0f} "
            f"{row['peak_memory_bytes'] / 2**30:>11.2f} {row['kernels']:>8,} {row['small_kernels']:>7,} "
            f"{exchanged / 1e6:>13,.1f} {row['roofline_s'] * 1e3:>12.2f} {row['bound']:>8} {row['images_per_s']:>9,.0f}"
        )
    notes = "GB to and from main memory; accessed: on-chip memory included; ratio: to the first row"
    return "\n".join([*lines, f"(all per device and step; {notes})"])


def top_kernels(row: dict[str, Any]) -> str:
    """Returns a line for each of the kernels that move the most bytes: bytes, share of the step, kind and source."""
    lines = [f"the kernels of {row['attention']} that move the most bytes:"]
    for kernel in row["top"]:
        share = kernel["bytes"] / row["main_memory_bytes"]
        lines.append(
            f"{kernel['bytes'] / 1e6:>9,.1f} MB {share:>6.1%}  {kernel['kind']:28} {kernel['source']}  "
            f"{kernel['operation']}"
        )
    return "\n".join(lines)
