"""The commands: `python -m hga_flax COMMAND`."""

import contextlib
import importlib
import sys
from collections.abc import Iterator

from hga_flax.config.command_line import split_overrides
from hga_flax.errors import ArgumentParser, UserError, run_main
from hga_flax.processes.huge_pages import use_huge_pages

# Name: (module, one line of help). A module defines add_arguments(parser) and run(arguments) -> int | None, and
# is imported only when its command is called. If the command takes `--config` or sets `takes_overrides`, its
# `--config.key=value` arguments are in `arguments.overrides`.
COMMANDS = {
    "paper": ("hga_flax.paper.command", "compare the paper's tables and equations with ours"),
    "bench": ("hga_flax.bench.command", "time the data loader, the attentions or whole training steps"),
    "soak": (
        "hga_flax.bench.soak",
        "kill and resume a training run, and compare it bit by bit with an undisturbed one",
    ),
    "compile": (
        "hga_flax.bench.compile",
        "compile the training step for GPUs or TPUs on a machine without them",
    ),
    "tpu": ("hga_flax.bench.compile", "former name of compile"),
    "runs": ("hga_flax.pictures.runs", "list the runs in folders: network, attention, data, steps, best error, state"),
    "plot": ("hga_flax.pictures.plot", "plot the loss and error curves of runs, with the paper's values as lines"),
    "explain": ("hga_flax.pictures.explain", "show what a trained network looks at: Grad-CAM, gates and their cells"),
    "summary": ("hga_flax.pictures.summary", "summarise a network: shapes, parameters, operations, attention"),
    "networks": ("hga_flax.pictures.networks", "list the size and cost of every network, with and without attention"),
    "export": (
        "hga_flax.inference.export",
        "export a network as StableHLO, as ONNX or as weights for PyTorch",
    ),
    "study": ("hga_flax.lab.command", "run the missing runs of a study (rows x seeds), with any number of workers"),
    "report": ("hga_flax.lab.report", "report a study: means, paired differences and their uncertainty, plots"),
    "prepare": ("hga_flax.data.prepare", "write a data set as array_record files"),
}


def main(argv: list[str] | None = None) -> int | None:
    """Runs the command that `argv` names and returns its exit status.

    Raises:
        UserError: bad input to the command.
    """
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["train"], ["evaluate"], ["predict"]):
        raise UserError(f"{argv[0]} is a separate script: python {argv[0]}.py ...")
    parser = ArgumentParser(
        prog="python -m hga_flax", description="Image classification with Hierarchical Global Attention."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        subparser = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == called:
            with _needs_extras(name):
                command = importlib.import_module(module)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    if overrides and "config" not in arguments and "takes_overrides" not in arguments:
        raise UserError(f"{overrides[0]}: {arguments.command} takes no configuration")
    arguments.overrides = overrides
    with _needs_extras(arguments.command):
        return arguments.run(arguments)


@contextlib.contextmanager
def _needs_extras(command: str) -> Iterator[None]:
    """Reports a missing third-party package in one line; `pip install .` installs only what the library needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "hga_flax").startswith("hga_flax"):
            raise
        raise UserError(
            f"{command}: the Python package {error.name} is not installed; to install everything that hga_flax uses: "
            "pip install '.[pictures]' in the clone"
        ) from None


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
