"""Argument parsing shared by all commands. Imports no third-party package, so that --help is quick."""

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from hga_flax.errors import UserError, one_line
from hga_flax.version import checksum, version_of_code

_imported: list[str] = []  # modules given by --import
_code: dict[str, str] = {}  # their names with a checksum of their files when they were imported


class Import(argparse.Action):
    """`--import=MODULE`: imports the module while the arguments are parsed; the current folder is searched too."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value, option=None) -> None:
        import_module(value)


def import_module(name: str) -> None:
    """Imports a module as `--import` does.

    Raises:
        UserError: the module cannot be imported.
    """
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
        _imported.append(name)
        file = pathlib.Path(getattr(module, "__file__", None) or "")
        if file.is_file():
            _code[name] = f"{name} (code {checksum(file.parent if file.name == '__init__.py' else file)})"
    except Exception as error:
        raise UserError(f"--import={name}: {type(error).__name__}: {one_line(error)}") from None
    finally:
        sys.path.remove(os.getcwd())


def imported_modules() -> list[str]:
    """Returns the modules that this command's `--import` flags named."""
    return list(_imported)


def code_in_use() -> str:
    """Returns `version_of_code()` and the same of what `--import` named: runs of one study should share it."""
    return ", ".join([version_of_code(), *(_code[name] for name in sorted(_code))])


def import_flags() -> list[str]:
    """Returns this command's `--import` flags, to pass on to another command for the same run."""
    return [f"--import={module}" for module in _imported]


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--import`, which loads a module that registers attentions from outside the project."""
    parser.add_argument(
        "--import",
        action=Import,
        metavar="MODULE",
        help="Python module to import first, for example one that registers your attention",
    )


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and `--recipe`. Every configuration key is also a flag, see `split_overrides`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration file; its keys are flags too")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="training recipe: paper, modern-100, modern-300 or a file of your own",
    )


BEST = "best"  # default of --checkpoint
OF_RUN = ("ema", "raw")  # values of --weights that go with --workdir


def add_weights_flags(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """Adds the flags that select a network: `--workdir`, or `--weights` with `--model`, `--attention` and `--config`.

    Args:
        parser: the command's parser.
        many: whether `--workdir` may be repeated.
    """
    again: dict[str, Any] = {"action": "append"} if many else {}
    more = "; repeat for each run" if many else ""
    parser.add_argument("--workdir", metavar="DIR", help=f"folder of the run (train.py --workdir){more}", **again)
    parser.add_argument(
        "--weights",
        metavar="FILE|DIR|ema|raw",
        help="without --workdir: a weights file (torchvision, timm, CIFAR checkpoints) or the folder of a run; "
        "with --workdir: ema (default for a run with training.ema_decay) or raw",
    )
    parser.add_argument("--model", metavar="NAME", help="network in --weights=FILE, for example resnet50")
    parser.add_argument("--attention", metavar="NAME", help="attention in --weights=FILE (default: none)")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="with --weights: configuration file; its keys are flags too, and data.* flags take precedence",
    )


def parse_with_weights(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks a command line with the flags of `add_weights_flags` and `--config.key=value`."""
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(own)
    parsed.overrides = overrides
    check_weights_flags(parsed)
    return parsed


def check_weights_flags(arguments: argparse.Namespace) -> None:
    """Checks that the flags of `add_weights_flags` are consistent.

    Raises:
        UserError: neither or both of --workdir and --weights=FILE are given, or flags of one are used with the other.
    """
    if names_weights(arguments):
        if arguments.workdir:
            raise UserError(
                f"--weights={arguments.weights}: with --workdir choose ema or raw; for a file or another run, omit "
                "--workdir"
            )
        if getattr(arguments, "checkpoint", BEST) != BEST:
            raise UserError(
                f"--checkpoint={arguments.checkpoint}: only with --workdir; for the folder of a run write "
                f"--weights=DIR@{arguments.checkpoint}"
            )
        return
    given = [flag for flag in ("model", "attention", "config") if getattr(arguments, flag, None)]
    if not arguments.workdir:
        if arguments.weights:
            raise UserError(f"--weights={arguments.weights}: --workdir=DIR is missing: the folder of the run")
        raise UserError("--workdir=DIR is missing: the folder of the run; or give --weights=FILE --model=NAME")
    if given or arguments.overrides:
        flag = f"--{given[0]}" if given else arguments.overrides[0]
        raise UserError(f"{flag}: only for --weights=FILE; the run in --workdir has its own network and configuration")


def names_weights(arguments: argparse.Namespace) -> bool:
    """Returns whether the network comes from `--weights` alone, without a run's `--workdir`."""
    return arguments.weights is not None and arguments.weights not in OF_RUN


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the command's own arguments and its `--config.key=value` overrides."""
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
