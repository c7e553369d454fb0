"""`python -m hga_flax explain`: shows what trained networks look at in images.

    explain --workdir=DIR [--workdir=DIR2 ...] IMAGE|FOLDER... [--out=explain.png] [--class=NAME] [--checkpoint=best]

Draws each image with the Grad-CAM map of every run, for the predicted class or for `--class`. For HGA it adds
the cells that drive the gates of each stage; for HGA, SE and ECA the gates themselves. Images are decoded and
normalised as in evaluation. Unreadable images are reported and omitted; the exit status is then 1.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hga_flax.config.command_line import add_import_flag, add_weights_flags, check_weights_flags, names_weights
from hga_flax.errors import UserError, expand, one_line
from hga_flax.images import image_files

if TYPE_CHECKING:
    from hga_flax.pictures.gates import BlockGates

MOST_IMAGES = 16
EXTREMES = 3  # number of most closed and of most open channels listed per block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help=f"image files, patterns or folders; at most {MOST_IMAGES} images"
    )
    add_weights_flags(parser, many=True)
    parser.add_argument(
        "--out",
        default="explain.png",
        metavar="PATH",
        help="output file: .png, .svg or .pdf; without a suffix, both PNG and SVG (default: explain.png)",
    )
    parser.add_argument(
        "--class", dest="wanted", metavar="NAME|INDEX", help="class to explain (default: the predicted one)"
    )
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|latest|STEP", help="checkpoint to load (default: best)"
    )
    add_import_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draws and saves the picture, and prints its numbers.

    Raises:
        UserError: an image, a run or a class cannot be used, or the picture cannot be written.
    """
    from hga_flax.images.image_files import Endings, ignored_line
    from hga_flax.inference.predictor import find_images
    from hga_flax.pictures.style import output_files, save, styled

    check_weights_flags(arguments)
    files = output_files(arguments.out)
    ignored = Endings()
    images = list(find_images(arguments.images, sys.stdin, ignored))
    if line := ignored_line(ignored, "the folders"):
        print(line, file=sys.stderr)
    if len(images) > MOST_IMAGES:
        raise UserError(f"{len(images)} images: a picture holds at most {MOST_IMAGES}")
    encoded, bad = read_images(images)
    from hga_flax.pictures.explain_view import draw
    from hga_flax.pictures.gates import title
    from hga_flax.pictures.views import explain, explain_restored, with_labels
    from hga_flax.runs.console import Console

    if names_weights(arguments):
        from hga_flax.inference.from_weights import describe_weights, restore_given

        restored = restore_given(arguments)
        Console().table("weights", describe_weights(restored))
        views = [explain_restored(restored, arguments.weights, encoded, arguments.wanted)]
    else:
        views = [
            explain(path, arguments.checkpoint, encoded, arguments.wanted, arguments.weights)
            for path in arguments.workdir
        ]
    views = with_labels(views)
    names = short_names([path for path, _ in encoded])
    with styled():
        save(draw(views, names), files)
    console = Console()
    rows = [(name, view.label, view.titles[i].replace("\n", ", ")) for i, name in enumerate(names) for view in views]
    console.columns("classes", ("image", "run", "class"), rows)
    gates = [(view.label, *row) for view in views for row in gate_rows(view.blocks)]
    if gates:
        header = ("run", "block", "mean", "most closed channels", "most open channels", "driven by")
        what = title([block for view in views for block in view.blocks])
        console.columns(f"{what}, averaged over the images", header, gates)
    console.line("written: " + ", ".join(map(str, files)))
    if bad:
        raise UserError(f"{bad} of {len(images)} images could not be explained; they are named above")


def read_images(paths: Sequence[str]) -> tuple[list[tuple[str, bytes]], int]:
    """Returns (path, content) of each readable image, and the number of others, which it reports on standard error.

    Raises:
        UserError: no file holds an image; if there is only one file, the message names it.
    """
    from hga_flax.images.bad_images import BadImage
    from hga_flax.images.decoding import decode

    encoded, problems = [], []
    for path in paths:
        try:
            content = read_image(path)
            decode(content, 3)
            encoded.append((path, content))
        except BadImage as error:
            problems.append(f"{path}: {error}")
        except UserError as error:  # the message already names the file
            problems.append(str(error))
    if not encoded and len(problems) < 2:
        raise UserError(problems[0] if problems else "no images: standard input was empty")
    for problem in problems:
        print(one_line(problem), file=sys.stderr)
    if not encoded:
        raise UserError(f"none of {len(problems)} images could be explained; they are named above")
    return encoded, len(problems)


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the file names; repeated names get as many parent folders as needed to tell them apart.

    Bytes that are not UTF-8 become "\\xe9", because they could not be drawn.
    """
    parts = [pathlib.Path(path).parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        most = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names.append(os.fsencode(pathlib.Path(*own[-most:])).decode(errors="backslashreplace"))
    return names


def read_image(path: str) -> bytes:
    """Returns the bytes of a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return image_files.read_image(expand(path, "IMAGE"))
    except IsADirectoryError:
        raise UserError(f"{path}: a folder without images") from None
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None


def gate_rows(blocks: "Sequence[BlockGates]") -> list[tuple[str, ...]]:
    """Returns rows (block, mean factor, most closed channels, most open channels, shares of the grids).

    The values are averages over the images.
    """
    from hga_flax.pictures.gates import cell_shares, split_cells
    from hga_flax.pictures.views import percent

    rows = []
    for block in blocks:
        gate = block.factor.mean(axis=0)
        order = np.argsort(gate, kind="stable")
        decimals = 2 if block.share is None else 4  # factors are often very close to 1
        tell = lambda channels, gate=gate, decimals=decimals: ", ".join(
            f"{c}: {gate[c]:.{decimals}f}" for c in channels
        )
        driven = "-"
        if block.drive is not None:
            shares = cell_shares([block]).sum(axis=0)
            grids = split_cells(shares / max(shares.sum(), 1e-30), block.bins)
            driven = ", ".join(f"{len(grid)}x{len(grid)} {percent(grid.sum())}" for grid in grids)
        rows.append(
            (
                block.block,
                f"{gate.mean():.{decimals + 1}f}",
                tell(order[:EXTREMES]),
                tell(order[::-1][:EXTREMES]),
                driven,
            )
        )
    return rows
