"""Labels images with a run's checkpoint, or with a file of weights.

python predict.py --workdir=DIR IMAGE... [--top=5] [--json|--csv] [--checkpoint=best|latest|STEP]
python predict.py --weights=FILE --model=NAME IMAGE... [--top=5] [--json|--csv]
"""

import csv
import io
import json
import sys
from collections.abc import Callable

from hga_flax.config.command_line import add_import_flag, add_weights_flags, names_weights, parse_with_weights
from hga_flax.errors import ArgumentParser, UserError, run_main
from hga_flax.processes.huge_pages import use_huge_pages

Prediction = tuple[str, int, float]  # class name, class index, probability
CSV_HEADER = ("file", "rank", "class", "index", "probability")


def as_text(file: str, predictions: list[Prediction]) -> str:
    return f"{file}  " + "  ".join(f"{name} {probability:.2%}" for name, _, probability in predictions)


def as_json(file: str, predictions: list[Prediction]) -> str:
    rows = [{"class": name, "index": index, "probability": share} for name, index, share in predictions]
    return json.dumps({"file": file, "predictions": rows})


def as_csv(file: str, predictions: list[Prediction]) -> str:
    text = io.StringIO()
    rows = [(file, rank, *prediction) for rank, prediction in enumerate(predictions, start=1)]
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().removesuffix("\n")


def main() -> int:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add_weights_flags(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, patterns or folders; - reads their names from standard input",
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of most probable classes to print (default: 5)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object per line")
    form.add_argument("--csv", action="store_true", help=f"print the columns {', '.join(CSV_HEADER)}")
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|latest|STEP", help="checkpoint to load (default: best)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="largest batch size (default: that of the evaluation)"
    )
    add_import_flag(parser)
    arguments = parse_with_weights(parser)
    if arguments.top < 1:
        raise UserError(f"--top={arguments.top}: must be at least 1")

    from hga_flax.images.image_files import Endings, ignored_line
    from hga_flax.inference.predictor import Predictor, find_images  # imported late, so that --help is quick
    from hga_flax.training.restore import configure_for

    if names_weights(arguments):
        from hga_flax.inference.from_weights import describe_weights, restore_given

        restored = restore_given(arguments, batch_size=arguments.batch_size)
        for name, value in describe_weights(restored):  # not on stdout: the labels may go to a file
            print(f"{name}: {value}", file=sys.stderr)
        predictor = Predictor(restored)
    else:
        configure_for(arguments.workdir)
        predictor = Predictor.from_workdir(
            arguments.workdir, arguments.checkpoint, batch_size=arguments.batch_size, weights=arguments.weights
        )
    if sys.stdout is None:  # closed by the caller: >&-
        raise UserError("standard output is closed: the labels have nowhere to go")
    ignored = Endings()
    total = None if "-" in arguments.images else sum(1 for _ in find_images(arguments.images, sys.stdin))
    files = find_images(arguments.images, sys.stdin, ignored)
    form = as_json if arguments.json else as_csv if arguments.csv else as_text
    if arguments.csv:
        print(",".join(CSV_HEADER))
    count, bad = label(predictor, files, total, lambda file, row: form(file, likeliest(predictor, row, arguments.top)))
    if line := ignored_line(ignored, "the folders"):
        print(line, file=sys.stderr)
    if not count:
        raise UserError("no images: standard input was empty")
    if bad:
        raise UserError(f"could not label {bad:,} of {count:,} images; see the lines above")
    return 0


def likeliest(predictor, probabilities, top: int) -> list[Prediction]:
    """Returns the `top` most probable classes, most probable first; ties are in the order of their indices."""
    order = (-probabilities).argsort(kind="stable")[:top]
    return [(predictor.class_names[i], int(i), float(probabilities[i])) for i in order]


def label(predictor, files, total: int | None, line: Callable[..., str]) -> tuple[int, int]:
    """Prints a line per file, and a progress bar on a terminal; returns the number of files and of bad images."""
    from numpy import isfinite
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hga_flax.images.bad_images import BadImage

    # The lines and the bar share the terminal; if the lines go to a file, the bar goes to stderr.
    console = Console(stderr=not sys.stdout.isatty(), highlight=False, soft_wrap=True, emoji=False)
    write = (lambda text: console.print(text, markup=False)) if sys.stdout.isatty() else print
    columns = TextColumn("images"), MofNCompleteColumn(), BarColumn(24), TimeRemainingColumn()
    count = bad = 0
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        for file, row in predictor.stream(files):
            count += 1
            if not isinstance(row, BadImage) and not isfinite(row).all():
                row = "the network's outputs are not finite"
            if isinstance(row, BadImage | str):
                bad += 1
                print(f"{file or repr(file)}: {row}", file=sys.stderr)
            else:
                write(line(file, row))
            progress.advance(task)
    return count, bad


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
