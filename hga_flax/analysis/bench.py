"""`python -m hga_flax bench`: how fast a part of the system is, alone.

    bench input --config=FILE [--compare] [--json] [--config.key=value]

times the loader of a configuration: reading, decoding, augmenting and batching, without a network.
With --config.data.fake=true it loads JPEGs of 500x375 made from photographs. `--compare` runs
tf.data and torch's DataLoader with Pillow beside it, where they are installed.
"""

import argparse
import json
import sys

from hga_flax.config import configure, validate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", choices=("input",), help="input: the loader")
    parser.add_argument("--config", required=True, metavar="FILE", help="a file of configs/; its keys are flags too")
    parser.add_argument("--compare", action="store_true", help="time tf.data and torch with Pillow too, on JPEGs")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default: 5)")
    parser.add_argument("--json", action="store_true", help="print a list of rows as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints.

    Raises:
        UserError: the configuration or its data cannot be used.
    """
    config = validate(configure(arguments.config, arguments.overrides))
    from hga_flax.data.bench_input import bench_input  # after the arguments: --help answers at once

    rows = bench_input(config, arguments.compare, arguments.seconds, lambda line: print(line, file=sys.stderr))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'loader':40} {'images/s':>10} {'per core':>10} {'ratio':>7}")
    for row in rows:
        print(
            f"{row['loader']:40} {row['images_per_s']:>10,.0f} {row['images_per_s_per_core']:>10,.0f} "
            f"{row['ratio_to_first']:>7.2f}"
        )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in rows[0]["shares"].items())
    print(f"shares of our loader's time: {shares}")
