"""`python -m hga_flax summary`: prints shapes and costs of a network, part by part.

    summary --workdir=DIR | --config=FILE | --weights=FILE --model=NAME
            [--blocks] [--format=terminal|markdown|json] [--config.key=value]

Prints shapes, parameters and multiply-accumulates of each stage or block, and the attention's
share of them. The network is only traced: nothing is computed and no memory is allocated.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

from hga_flax.config.command_line import add_import_flag, add_weights_flags, check_weights_flags, names_weights
from hga_flax.errors import UserError

FORMATS = ("terminal", "markdown", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_weights_flags(parser)
    parser.add_argument("--blocks", action="store_true", help="one row per block instead of one per stage")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="output format (default: terminal)")
    add_import_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        UserError: the workdir, the configuration or the weights cannot be used.
    """
    if names_weights(arguments):
        check_weights_flags(arguments)
    elif (arguments.workdir is None) == (arguments.config is None):
        raise UserError("exactly one of --workdir, --config and --weights is required; see summary --help")
    elif arguments.workdir is not None:
        check_weights_flags(arguments)
    elif given := [name for name in ("model", "attention", "weights") if getattr(arguments, name)]:
        key = {"model": "model.name", "attention": "model.attention"}.get(given[0])
        instead = f"; with --config write --config.{key}=..." if key else ""
        raise UserError(f"--{given[0]}={getattr(arguments, given[0])}: only for --weights=FILE{instead}")
    from hga_flax.config.loading import build_model, configure, validate
    from hga_flax.counting.parts import model_parts, parts_table
    from hga_flax.data.sources import dataset_info
    from hga_flax.runs.console import Console
    from hga_flax.runs.local_copy import find
    from hga_flax.runs.workdir import read_config, read_dataset
    from hga_flax.training.state import calling_network

    if names_weights(arguments):
        from hga_flax.inference.from_weights import restore_given

        experiment = restore_given(arguments).experiment
        config, info = experiment.config, experiment.dataset.info
    elif arguments.workdir is not None:
        workdir = find(arguments.workdir, light=True)
        config, info = read_config(workdir), read_dataset(workdir)
        validate(config)
    else:
        config = validate(configure(arguments.config, arguments.overrides))
        info = dataset_info(config.data.name, config.data.dir)
    image_shape = (config.data.image_size, config.data.image_size, info.channels)
    with calling_network("config.model cannot be built"):
        parts = model_parts(build_model(config, info.num_classes), image_shape, blocks=arguments.blocks)
    title = (
        f"{config.model.name}, attention {config.model.attention}, images {'x'.join(map(str, image_shape))}, "
        f"{info.num_classes} classes"
    )
    if arguments.format == "json":
        print(json.dumps([dataclasses.asdict(part) for part in parts], indent=2))
    elif arguments.format == "markdown":
        print(f"{title}\n\n{markdown(*parts_table(parts))}")
    else:
        Console().columns(title, *parts_table(parts))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with the first column left-aligned and the others right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
