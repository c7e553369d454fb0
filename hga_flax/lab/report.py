"""`python -m hga_flax report STUDY`: means, paired differences with confidence intervals, and costs."""

import argparse
import pathlib
import sys

from hga_flax.errors import UserError, expand
from hga_flax.lab.command import add_study_flags

FORMATS = ("terminal", "markdown", "csv", "json")
METRICS = ("top1_error", "top5_error", "loss")
SUFFIXES = {"markdown": "md", "csv": "csv", "json": "json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("study", metavar="STUDY", help="study file, folder of a study, or the JSON of a saved report")
    parser.add_argument("--dir", metavar="DIR", help="folder of the study's runs (default: set in the study file)")
    add_study_flags(parser)
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="output format (default: terminal)")
    parser.add_argument(
        "--save", metavar="DIR", help="also write DIR/NAME.md, .csv and .json, and the plots as .png and .svg"
    )
    parser.add_argument("--runs", action="store_true", help="print each run's workdir and command instead of the table")
    parser.add_argument(
        "--metric", choices=METRICS, default=METRICS[0], help=f"metric to compare (default: {METRICS[0]})"
    )
    parser.add_argument(
        "--baseline", metavar="ROW", help="row to compare the others with (default: set in the study file)"
    )
    parser.add_argument("--time", action="store_true", help="first time the training step of every row on this machine")


def run(arguments: argparse.Namespace) -> None:
    """Prints the report, and saves it if requested.

    Raises:
        UserError: there is no such study or row, or a file cannot be read or written.
    """
    from hga_flax.lab import results, tables

    if arguments.runs and arguments.format != FORMATS[0]:
        raise UserError(f"--format={arguments.format}: not with --runs; --format=json has the runs too")
    which = (arguments.study, arguments.dir, arguments.scale, arguments.overrides)
    if arguments.time:
        from hga_flax.lab.step_times import measure

        measure(*results.locate(*which), lambda line: print(line, file=sys.stderr, flush=True))
    loaded = results.load(*which)
    told = results.analyse(loaded, arguments.metric, arguments.baseline)
    sys.stdout.write(
        "\n".join([*tables.run_lines(told), ""]) if arguments.runs else tables.render(told, arguments.format)
    )
    if arguments.save is not None:
        for file in save(told, expand(arguments.save, "--save")):
            print(f"wrote {file}", file=sys.stderr)


def save(told: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes a report in every format, and its plots; returns the files.

    Raises:
        UserError: a file cannot be written, or the folder is the study's own.
    """
    from hga_flax.lab import results, tables
    from hga_flax.pictures.costs import draw_costs

    if results.is_record(folder / f"{told['study']}.json"):
        raise UserError(f"--save={folder}: this folder holds the study's runs; choose another, such as {folder}/report")
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for form, suffix in SUFFIXES.items():
            file = folder / f"{told['study']}.{suffix}"
            file.write_text(tables.render(told, form))
            files.append(file)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written: {error.strerror}") from None
    return files + draw_costs(told, folder, results.METRICS[told["metric"]])
