"""What every command's arguments have in common; imports no library, so that a command decides what it needs."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from hga_flax.errors import UserError, one_line

_imported: list[str] = []  # by --import


class Import(argparse.Action):
    """`--import=MODULE`: imports it, from the current folder too, while the arguments are read."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value, option=None) -> None:
        sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(value)
            _imported.append(value)
        except Exception as error:
            raise UserError(f"--import={value}: {type(error).__name__}: {one_line(error)}") from None
        finally:
            sys.path.remove(os.getcwd())


def import_flags() -> list[str]:
    """Returns the `--import` flags that this command was given, as another command on the same run needs them."""
    return [f"--import={module}" for module in _imported]


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--import`, by which attentions that are not the project's become known by name."""
    parser.add_argument(
        "--import", action=Import, metavar="MODULE", help="import this first: it registers an attention of yours"
    )


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and `--recipe`; any key of the configuration is a flag beside them, see `split_overrides`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file of configs/; its keys are flags too")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="train by a file of configs/recipes/: paper, modern-100, modern-300, or yours.py",
    )


OF_RUN = ("ema", "raw")  # what --weights may say of a run


def add_weights_flags(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """Adds what a network comes from: `--workdir`, or `--weights` with `--model`, `--attention` and `--config`.

    Args:
        parser: of the command.
        many: `--workdir` may be given again.
    """
    again = {"action": "append"} if many else {}
    more = "; again for each run" if many else ""
    parser.add_argument("--workdir", metavar="DIR", help=f"the folder that train.py was given{more}", **again)
    parser.add_argument(
        "--weights",
        metavar="FILE|DIR|ema|raw",
        help="instead of --workdir a file of torchvision's, timm's or a CIFAR program's weights, or a run's folder; "
        "with --workdir which of a run's: ema (default where training.ema_decay kept an average) or raw",
    )
    parser.add_argument("--model", metavar="NAME", help="of --weights=FILE: the network, such as resnet50")
    parser.add_argument("--attention", metavar="NAME", help="of --weights=FILE: its attention (default: none)")
    parser.add_argument(
        "--config", metavar="FILE", help="of --weights: a file of configs/; its keys are flags too, and data.* wins"
    )


def parse_with_weights(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line with the flags of `add_weights_flags` and `--config.key=value`, and checks them."""
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(own)
    parsed.overrides = overrides
    check_weights_flags(parsed)
    return parsed


def check_weights_flags(arguments: argparse.Namespace) -> None:
    """Checks the flags of `add_weights_flags` together.

    Raises:
        UserError: not one of --workdir and --weights=FILE, or flags of the one with the other.
    """
    if names_weights(arguments):
        if arguments.workdir:
            raise UserError(
                f"--weights={arguments.weights}: with --workdir choose ema or raw; a file or another run stands alone"
            )
        return
    given = [flag for flag in ("model", "attention", "config") if getattr(arguments, flag, None)]
    if not arguments.workdir:
        if arguments.weights:
            raise UserError(f"--weights={arguments.weights}: --workdir=DIR is missing: the run that has them")
        raise UserError(
            "--workdir=DIR is missing: the folder that train.py was given; or give --weights=FILE --model=NAME"
        )
    if given or arguments.overrides:
        flag = f"--{given[0]}" if given else arguments.overrides[0]
        raise UserError(f"{flag}: goes with --weights=FILE; --workdir has its network and configuration")


def names_weights(arguments: argparse.Namespace) -> bool:
    """Whether a network comes from `--weights` alone and not from a run's `--workdir`."""
    return arguments.weights is not None and arguments.weights not in OF_RUN


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides a command's arguments into its own and the `--config.key=value` among them."""
    own: list[str] = []
    overrides: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--config."):
            own.append(argument)
            continue
        if "=" not in argument and pending and not pending[0].startswith("--"):
            argument += "=" + pending.pop(0)  # "--config.key value"
        overrides.append(argument)
    return own, overrides
