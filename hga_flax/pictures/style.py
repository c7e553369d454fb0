"""Styles and saves all pictures; does without pyplot, so that no window system is needed."""

import pathlib
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hga_flax.errors import UserError, expand, one_line

# Okabe and Ito, Color Universal Design, 2008: distinguishable with every kind of colour vision. Their yellow is left
# out because it is hard to see on white. In greyscale, line styles and markers make the difference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "*", "h")
INK, GREY = "#1f2933", "#52606d"
PIXELS = 1280  # width of a PNG: sharp in a README on a high-density screen; SVG and PDF are for print
FORMATS = (".png", ".svg", ".pdf")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # names of runs and files may hold dollar signs
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.hashsalt": "hga_flax",  # reproducible files: equal pictures give equal bytes
}


def styled() -> Any:
    """Returns a context manager for drawing and saving in the project's style; ignores the user's matplotlibrc."""
    return matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE)


def output_files(out: str) -> list[pathlib.Path]:
    """Returns the files that `--out` names: the given one, or a PNG and an SVG if it has no suffix.

    Raises:
        UserError: unsupported suffix, or the folder does not exist.
    """
    path = expand(out, "--out")
    if path.is_dir() or not path.name:
        raise UserError(f"--out={out}: is a folder; give a file name")
    if not path.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {path.parent}")
    if path.suffix.lower() in FORMATS:
        return [path]
    if path.suffix:
        raise UserError(f"--out={out}: must end in {', '.join(FORMATS)}, or have no suffix for a PNG and an SVG")
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def save(figure: Figure, files: list[pathlib.Path]) -> None:
    """Writes a figure to each file.

    Raises:
        UserError: a file cannot be written.
    """
    for file in files:
        # No date and no version, so that equal pictures give equal bytes.
        metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        smaller = {"pil_kwargs": {"optimize": True}} if file.suffix.lower() == ".png" else {}
        options = {"dpi": PIXELS / figure.get_figwidth(), "metadata": metadata[file.suffix.lower()]} | smaller
        try:
            figure.savefig(file, **options)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or one_line(error)}") from None
