"""`python -m hga_flax explain`: what trained networks look at in images.

    explain --workdir=DIR [--workdir=DIR2 ...] IMAGE... [--out=explain.png] [--class=NAME] [--checkpoint=best]

Beside each image Grad-CAM of every run, for the class that it predicts or for `--class`. For HGA the
cells that drive its gates, stage by stage, for HGA, SE and ECA the gates themselves. The images are
decoded and normalised as in evaluation.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hga_flax.command_line import add_import_flag
from hga_flax.errors import UserError, expand, nearest, one_line

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
    encoded = [read_image(path) for path in arguments.images]
    from hga_flax.pictures.explain_view import draw
    from hga_flax.training.console import Console

    views = [explain(path, arguments.checkpoint, encoded, arguments.wanted) for path in arguments.workdir]
    views = with_labels(views)
    names = [pathlib.Path(path).name for path in arguments.images]
    with styled():
        save(draw(views, names), files)
    console = Console()
    rows = [(name, view.label, view.titles[i]) for i, name in enumerate(names) for view in views]
    console.columns("classes", ("image", "run", "class"), rows)
    gates = [(view.label, *row) for view in views for row in gate_rows(view.blocks)]
    if gates:
        header = ("run", "block", "mean", "most closed channels", "most open channels", "driven by")
        console.columns("gates, averaged over the images", header, gates)
    console.line("written: " + ", ".join(map(str, files)))


@dataclasses.dataclass(frozen=True)
class View:
    """What one run makes of B images.

    Attributes:
        label: the name of its attention, or of its folder where that does not tell the runs apart.
        workdir: its folder.
        images: uint8 `[B, H, W, C]`, as the network is given them, before normalisation.
        titles: the explained class of each image and its probability.
        cams: `[B, h, w]`.
        blocks: the gates, none for an attention without.
    """

    label: str
    workdir: str
    images: np.ndarray
    titles: list[str]
    cams: np.ndarray
    blocks: "list[BlockGates]"


def read_image(path: str) -> bytes:
    """Returns the bytes of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return expand(path, "IMAGE").read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from None


def explain(path: str, checkpoint: str, encoded: Sequence[bytes], wanted: str | None) -> View:
    """Restores a run and explains a class of each image.

    Args:
        path: the workdir.
        checkpoint: "best", "latest" or a step.
        encoded: the images, as files hold them.
        wanted: the class's name or index; None explains the predicted one.

    Raises:
        UserError: the run or an image cannot be used, or it has no such class.
    """
    from hga_flax.data.device_augmentation import normalize
    from hga_flax.pictures.gates import read_gates
    from hga_flax.pictures.gradcam import look
    from hga_flax.training.restore import restore_workdir

    restored = restore_workdir(path, checkpoint)
    experiment, variables = restored.experiment, variables_of(restored)
    config, info = experiment.config, experiment.dataset.info
    chosen = None if wanted is None else find_class(wanted, info.class_names, info.num_classes, path)
    images = preprocess(encoded, config, info.channels)
    classes = None if chosen is None else np.full(len(images), chosen)
    seen = look(experiment.model, variables, normalize(images, config.data.mean, config.data.std), classes)
    titles = class_titles(seen.logits, seen.classes, info.class_names)
    blocks = read_gates(experiment.model, variables, seen.intermediates)
    return View(config.model.attention, path, images, titles, seen.cams, blocks)


def variables_of(restored: Any) -> dict[str, Any]:
    """Returns `params` and `batch_stats` of a restored run, on the host."""
    import jax

    return jax.device_get({"params": restored.state.params, "batch_stats": restored.state.batch_stats})


def preprocess(encoded: Sequence[bytes], config: Any, channels: int) -> np.ndarray:
    """Decodes and crops images as evaluation does: uint8 `[B, size, size, channels]`.

    Raises:
        UserError: the bytes are no image; the message gives its place in the list.
    """
    from hga_flax.data.bad_images import BadImage
    from hga_flax.data.host_augmentation import host_transform

    transform = host_transform(config.data, channels, False, config.seed)
    images = []
    for number, image in enumerate(encoded, start=1):
        try:
            images.append(transform(image, 0, 0))
        except BadImage as error:
            raise UserError(f"image {number} of {len(encoded)}: {error}") from None
    return np.stack(images)


def find_class(wanted: str, names: Sequence[str], count: int, path: str) -> int:
    """Returns the index of a class by its name, or else by its index.

    Raises:
        UserError: there is no such class.
    """
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < count:
        return int(wanted)
    hint = nearest(wanted, names)
    raise UserError(f"--class={wanted}: {path} has no such class{hint}; give a name, or an index up to {count - 1}")


def class_titles(logits: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> list[str]:
    """Returns "name 99 %" for each image, and what was predicted in its place where that is another class."""
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares = exact / exact.sum(axis=-1, keepdims=True)
    name = lambda index: names[index] if index < len(names) else str(index)
    titles = []
    for row, chosen in zip(shares, classes, strict=True):
        title = f"{name(chosen)} {percent(row[chosen])}"
        if row.argmax() != chosen:
            title += f" (predicted {name(row.argmax())} {percent(row.max())})"
        titles.append(title)
    return titles


def percent(share: float) -> str:
    """Returns a share in percent, with decimals only near the ends, where they tell something."""
    return f"{100 * share:.0f} %" if 0.01 <= share <= 0.99 else f"{100 * share:.1f} %"


def with_labels(views: Sequence[View]) -> list[View]:
    """Gives the runs labels that tell them apart: attentions, else folders, else paths."""
    for label in (lambda view: view.label, lambda view: pathlib.Path(view.workdir).name, lambda view: view.workdir):
        labels = [label(view) for view in views]
        if len(set(labels)) == len(views):
            break
    return [dataclasses.replace(view, label=label) for view, label in zip(views, labels, strict=True)]


def gate_rows(blocks: "Sequence[BlockGates]") -> list[tuple[str, ...]]:
    """Returns (block, mean gate, most closed and most open channels, the grids' shares), averaged over the images."""
    from hga_flax.pictures.gates import cell_shares, split_cells

    rows = []
    for block in blocks:
        gate = block.gate.mean(axis=0)
        order = np.argsort(gate, kind="stable")
        tell = lambda channels, gate=gate: ", ".join(f"{channel}: {gate[channel]:.2f}" for channel in channels)
        driven = "-"
        if block.drive is not None:
            grids = split_cells(cell_shares([block]).mean(axis=0), block.bins)
            driven = ", ".join(f"{len(grid)}x{len(grid)} {grid.sum():.0%}" for grid in grids)
        rows.append((block.block, f"{gate.mean():.3f}", tell(order[:EXTREMES]), tell(order[::-1][:EXTREMES]), driven))
    return rows
