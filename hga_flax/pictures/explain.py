"""`python -m hga_flax explain`: what trained networks look at in images.

    explain --workdir=DIR [--workdir=DIR2 ...] IMAGE... [--out=explain.png] [--class=NAME] [--checkpoint=best]

Beside each image Grad-CAM of every run, for the class that it predicts or for `--class`. For HGA the
cells that drive its gates, stage by stage, for HGA, SE and ECA the gates themselves. The images are
decoded and normalised as in evaluation.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hga_flax.command_line import add_import_flag
from hga_flax.errors import UserError, expand, one_line

if TYPE_CHECKING:
    from hga_flax.pictures.gates import BlockGates

MOST_IMAGES = 16
EXTREMES = 3  # channels named at both ends of a block's gates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=f"a file, or up to {MOST_IMAGES}")
    parser.add_argument(
        "--workdir", action="append", required=True, metavar="DIR", help="the folder of a run; again for each run"
    )
    parser.add_argument(
        "--out", default="explain.png", metavar="PATH", help="PATH.png, .svg or .pdf; no ending: PNG and SVG"
    )
    parser.add_argument(
        "--class", dest="wanted", metavar="NAME|INDEX", help="explain this class (default: the predicted one)"
    )
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|STEP", help="which one (default: best)")
    add_import_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draws, writes and prints what the picture shows in numbers.

    Raises:
        UserError: an image, a run or a class cannot be used, or the picture cannot be written.
    """
    from hga_flax.pictures.style import output_files, save, styled

    files = output_files(arguments.out)
    if len(arguments.images) > MOST_IMAGES:
        raise UserError(f"{len(arguments.images)} images: a picture holds up to {MOST_IMAGES}")
    encoded = [(path, read_image(path)) for path in arguments.images]
    from hga_flax.pictures.explain_view import draw
    from hga_flax.pictures.gates import title
    from hga_flax.pictures.views import explain, with_labels
    from hga_flax.training.console import Console

    views = [explain(path, arguments.checkpoint, encoded, arguments.wanted) for path in arguments.workdir]
    views = with_labels(views)
    names = [pathlib.Path(path).name for path in arguments.images]
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


def read_image(path: str) -> bytes:
    """Returns the bytes of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return expand(path, "IMAGE").read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None


def gate_rows(blocks: "Sequence[BlockGates]") -> list[tuple[str, ...]]:
    """Returns (block, mean factor, most closed and most open channels, the grids' shares), averaged over the images."""
    from hga_flax.pictures.gates import cell_shares, split_cells
    from hga_flax.pictures.views import percent

    rows = []
    for block in blocks:
        gate = block.factor.mean(axis=0)
        order = np.argsort(gate, kind="stable")
        tell = lambda channels, gate=gate: ", ".join(f"{channel}: {gate[channel]:.2f}" for channel in channels)
        driven = "-"
        if block.drive is not None:
            shares = cell_shares([block]).sum(axis=0)
            grids = split_cells(shares / max(shares.sum(), 1e-30), block.bins)
            driven = ", ".join(f"{len(grid)}x{len(grid)} {percent(grid.sum())}" for grid in grids)
        rows.append((block.block, f"{gate.mean():.3f}", tell(order[:EXTREMES]), tell(order[::-1][:EXTREMES]), driven))
    return rows
