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


def add_weights_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--weights`, the choice between a run's moving average and its last weights."""
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="default: the moving average where training.ema_decay kept one"
    )


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
