"""`python -m hga_flax bench`: measures the speed of one part of the system.

    bench input --config=FILE [--compare] [--json] [--config.key=value]

times the loader of a configuration: reading, decoding, augmenting and batching, without a network.
With --config.data.fake=true it loads 500x375 JPEGs made from photographs. `--compare` also times
tf.data and torch's DataLoader with Pillow, if they are installed.

    bench attention [--batch=8] [--dtype=float32] [--attentions=se,hga,hga-conv,...] [--json]

times every attention on the feature maps of ResNet-50's four stages, forward and with gradients.

    bench step [--models=resnet50:none,resnet50:se,...] [--batch=16] [--dtype=float32] [--vs-torch] [--json]

times train.py's own training step on random images, on one accelerator or all cores of the CPU.
"""

import argparse
import json
import math
import sys
from typing import Any

from hga_flax.config.command_line import add_config_flags, add_import_flag
from hga_flax.errors import UserError

DTYPES = ("float32", "bfloat16")
MODELS = "resnet50:none,resnet50:se,resnet50:hga,resnet50:hga-conv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    loader = kinds.add_parser(
        "input", help="time the data loader of a configuration", description="Time the data loader of a configuration."
    )
    add_config_flags(loader)
    loader.add_argument("--compare", action="store_true", help="also time tf.data and PyTorch with Pillow, on JPEGs")
    loader.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default: 5)")
    attention = kinds.add_parser(
        "attention",
        help="time every attention at the four stages of ResNet-50",
        description="Time every attention at the four stages of ResNet-50.",
    )
    attention.add_argument(
        "--attentions", metavar="NAMES", help="attentions, separated by commas (default: all, and hga-conv)"
    )
    attention.add_argument("--batch", type=int, default=8, help="batch size (default: 8)")
    attention.add_argument("--rounds", type=int, default=7, help="measurements of each attention (default: 7)")
    step = kinds.add_parser("step", help="time whole training steps", description="Time whole training steps.")
    step.add_argument(
        "--models",
        default=MODELS,
        metavar="NETWORK:ATTENTION,...",
        help=f"networks and their attentions (default: {MODELS})",
    )
    step.add_argument("--batch", type=int, default=16, help="batch size (default: 16)")
    step.add_argument(
        "--image-size", type=int, default=224, help="height and width of the images in pixels (default: 224)"
    )
    step.add_argument("--steps", type=int, default=10, help="measurements of each network (default: 10)")
    step.add_argument(
        "--vs-torch",
        action="store_true",
        help="also time PyTorch's counterparts: timm's networks, and HGA in plain PyTorch",
    )
    for kind in (attention, step):
        kind.add_argument(
            "--dtype", choices=DTYPES, default="float32", help="data type of the computation (default: float32)"
        )
    for kind in (attention, step):
        add_import_flag(kind)
    for kind in (loader, attention, step):
        kind.add_argument("--json", action="store_true", help="print a list of rows as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        UserError: the configuration, its data, a model or a number cannot be used.
    """
    for name in ("batch", "image_size", "rounds", "steps"):
        if getattr(arguments, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(arguments, name)}: must be positive")
    if not 0 < getattr(arguments, "seconds", 1.0) < math.inf:
        raise UserError(f"--seconds={arguments.seconds:g}: must be positive and finite")
    rows, text = {"input": _input, "attention": _attention, "step": _step}[arguments.what](arguments)
    print(json.dumps(rows, indent=2) if arguments.json else text)


# Imports are inside the functions so that --help is fast.
def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _input(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    from hga_flax.config.loading import configure, validate

    config = validate(configure(arguments.config, arguments.overrides, arguments.recipe))
    from hga_flax.bench.input import bench_input

    rows = bench_input(config, arguments.compare, arguments.seconds, _log)
    lines = [f"{'loader':40} {'images/s':>10} {'per core':>10} {'ratio':>7}"]
    for row in rows:
        lines.append(
            f"{row['loader']:40} {row['images_per_s']:>10,.0f} {row['images_per_s_per_core']:>10,.0f} "
            f"{row['ratio_to_first']:>7.2f}"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in rows[0]["shares"].items())
    return rows, "\n".join([*lines, f"shares of our loader's time: {shares}"])


def _attention(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    from hga_flax.bench.attention import bench_attention, table

    names = [name.strip() for name in arguments.attentions.split(",")] if arguments.attentions else None
    rows = bench_attention(names, arguments.batch, arguments.dtype, arguments.rounds, _log)
    return rows, table(rows)


def _step(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    from hga_flax.bench.step import bench_step, table

    rows = bench_step(
        [name.strip() for name in arguments.models.split(",")],
        arguments.batch,
        arguments.image_size,
        arguments.dtype,
        arguments.steps,
        arguments.vs_torch,
        _log,
    )
    return rows, table(rows)
