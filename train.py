"""Trains a network, or goes on where a killed run stopped.

python train.py --config=configs/digits.py --workdir=runs/digits [--config.key=value ...]
"""

from hga_flax.config import parse_arguments
from hga_flax.errors import ArgumentParser, run_main
from hga_flax.training import distributed


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints and metrics go")
    distributed.add_flags(parser)
    arguments, config = parse_arguments(parser)
    distributed.start(arguments, config.training.lost_process_seconds)

    from hga_flax.training.trainer import train  # after the arguments: --help and mistakes answer at once

    distributed.together(config, lambda: train(config, arguments.workdir))


if __name__ == "__main__":
    run_main(main)
