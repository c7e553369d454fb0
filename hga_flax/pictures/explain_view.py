"""Draws the picture of `explain`: rows of images with Grad-CAM and HGA's cells, and the gates below."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hga_flax.pictures.gates import BlockGates, cell_shares, split_cells, title
from hga_flax.pictures.style import GREY, INK
from hga_flax.pictures.views import View, percent

# Lengths in inches. The colour maps are monotonic in lightness, so that they survive greyscale printing.
MARGIN, TILE, GAP, LINE, HEAD = 0.18, 1.16, 0.1, 0.2, 0.72
SMALL, CLOSE, APART, BETWEEN = 0.62, 0.07, 0.2, 0.32  # a grid of cells; gaps between grids, stages, sections
NARROWEST = 6.4
CAM_COLOURS, CELL_COLOURS, GATE_COLOURS = "inferno", "Blues", "cividis"
LETTERS = 15  # letters per inch of a caption


class Page:
    """A figure whose axes are placed in inches from the top left."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Returns axes without ticks or frame in a rectangle."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        return axes

    def text(self, left: float, top: float, words: str, **style: Any) -> None:
        """Writes a line of text with its top at `top`."""
        self.figure.text(left / self.width, 1 - top / self.height, words, **{"va": "top", "color": INK} | style)

    def scale(self, right: float, top: float, colours: str, low: str, high: str) -> None:
        """Draws a colour bar ending at `right`, labelled at both ends."""
        width, after = 0.7, 0.076 * len(high) + 0.11
        axes = self.axes(right - after - width, top + 0.04, width, 0.12)
        axes.imshow(np.linspace(0, 1, 128)[None], cmap=colours, aspect="auto")
        self.text(right, top, high, fontsize=10, color=GREY, ha="right")
        self.text(right - after - width - 0.05, top, low, fontsize=10, color=GREY, ha="right")


def draw(views: Sequence[View], names: Sequence[str]) -> Figure:
    """Returns the figure for some runs on the same images. Call inside `styled()`.

    Args:
        views: results of each run.
        names: names of the images.
    """
    with_cells = [view for view in views if view.blocks and view.blocks[0].drive is not None]
    with_gates = [view for view in views if view.blocks]
    widths = [_cells_width(view) for view in with_cells]
    strips = [_strips_height(view) for view in with_gates]
    grid = _grid(views, len(names), with_cells=bool(with_cells))
    width = 2 * MARGIN + grid.across * (grid.width + BETWEEN) - BETWEEN + sum(BETWEEN + w for w in widths)
    if with_gates:
        width = max(NARROWEST, width)
    titles = [_lines(title, grid.letters) for view in views for title in view.titles]
    step = grid.tile + max(map(len, titles)) * LINE + 0.14
    rows = -(-len(names) // grid.across)
    tops = [MARGIN + HEAD + i * step for i in range(rows + 1)]
    page = Page(width, tops[-1] + sum(strips) + MARGIN / 2)
    _cams(page, views, names, grid, tops)
    left = MARGIN + grid.width
    for view, cells_width in zip(with_cells, widths, strict=True):
        _cells(page, view, left + BETWEEN, cells_width, tops)
        left += BETWEEN + cells_width
    top = tops[-1]
    for view, strip in zip(with_gates, strips, strict=True):
        _strips(page, view, top)
        top += strip
    return page.figure


class Grid(NamedTuple):
    """Layout of the images and maps.

    Attributes:
        pictures: one image's pictures from left to right, as (run, whether its map is drawn over the image).
        across: number of images side by side.
        tile: width and height of a picture in inches.
    """

    pictures: list[tuple[View, bool]]
    across: int
    tile: float

    @property
    def width(self) -> float:
        """Width of one image's pictures, in inches."""
        return len(self.pictures) * (self.tile + GAP) - GAP

    @property
    def letters(self) -> int:
        """Number of letters that fit below a picture."""
        return int(LETTERS * self.tile)


def _grid(views: Sequence[View], images: int, with_cells: bool) -> Grid:
    """Returns the layout of the images; without cells beside them, they fill the width of the page.

    Runs with the same input share one image; otherwise each run's map is next to its own input.
    """
    same = all(np.array_equal(view.images, views[0].images) for view in views)
    pictures = [(views[0], False), *((view, True) for view in views)]
    if not same:
        pictures = [(view, over) for view in views for over in (False, True)]
    narrow = Grid(pictures, 1, TILE)
    if with_cells:
        return narrow
    room = NARROWEST - 2 * MARGIN
    across = min(images, max(1, int((room + BETWEEN) / (narrow.width + BETWEEN))))
    own = (room + BETWEEN) / across - BETWEEN
    return Grid(pictures, across, max(TILE, (own + GAP) / len(pictures) - GAP))


def _shown(image: np.ndarray) -> dict[str, Any]:
    """Returns the arguments of imshow for a uint8 image `[H, W, C]`."""
    if image.shape[-1] == 1:
        return {"X": image[..., 0], "cmap": "gray", "vmin": 0, "vmax": 255}
    return {"X": image}


def _grey(image: np.ndarray) -> np.ndarray:
    """Returns the luminance `[H, W]` of an image `[H, W, C]`."""
    return image[..., 0] if image.shape[-1] == 1 else image @ np.array([0.299, 0.587, 0.114])


def _cams(page: Page, views: Sequence[View], names: Sequence[str], grid: Grid, tops: Sequence[float]) -> None:
    """Draws each image, and the map of each run over the image in grey."""
    whole = grid.across * (grid.width + BETWEEN) - BETWEEN
    page.text(MARGIN, MARGIN, "Grad-CAM", fontweight="bold")
    page.scale(MARGIN + whole, MARGIN, CAM_COLOURS, "0", "max")
    for i, name in enumerate(names):
        row, place = divmod(i, grid.across)
        for column, (view, over) in enumerate(grid.pictures):
            left = MARGIN + place * (grid.width + BETWEEN) + column * (grid.tile + GAP)
            if row == 0:
                page.text(left + grid.tile / 2, MARGIN + HEAD - 0.28, view.label if over else "image", ha="center")
            axes = page.axes(left, tops[row], grid.tile, grid.tile)
            if over:
                _overlay(axes, view.images[i], view.cams[i])
            else:
                axes.imshow(**_shown(view.images[i]), aspect="auto")
            lines = _lines(view.titles[i], grid.letters) if over else [_end(name, grid.letters)]
            for number, line in enumerate(lines):
                at = tops[row] + grid.tile + 0.04 + number * LINE
                page.text(left + grid.tile / 2, at, line, ha="center", fontsize=10)


def _overlay(axes: Axes, image: np.ndarray, cam: np.ndarray) -> None:
    extent = (0, 1, 1, 0)
    axes.imshow(_grey(image), cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
    axes.imshow(cam / max(cam.max(), 1e-30), cmap=CAM_COLOURS, vmin=0, vmax=1, alpha=0.55, extent=extent,
                aspect="auto", interpolation="bilinear")  # fmt: skip


def _lines(title: str, letters: int) -> list[str]:
    """Returns a caption's lines: "predicted" gets its own line if needed; long names are cut, but not their shares."""
    lines = []
    if max(map(len, title.split("\n"))) > letters:
        title = title.replace("\npredicted ", "\npredicted:\n")
    for line in title.split("\n"):
        name, bracket, rest = line.rpartition(" (")
        name, rest = (name, bracket + rest) if bracket else (line, "")
        most = letters - len(rest)
        lines.append((name if len(name) <= most else name[: most - 2] + "..") + rest)
    return lines


def _end(name: str, letters: int) -> str:
    """Returns a file's name, or only the end of a long name, which distinguishes it better than the start."""
    return name if len(name) <= letters else ".." + name[2 - letters :]


def _stages(blocks: Sequence[BlockGates]) -> dict[str, list[BlockGates]]:
    stages: dict[str, list[BlockGates]] = {}
    for block in blocks:
        stages.setdefault(block.stage, []).append(block)
    return stages


def _stage_width(view: View) -> float:
    return len(view.blocks[0].bins) * (SMALL + CLOSE) - CLOSE


def _cells_width(view: View) -> float:
    return len(_stages(view.blocks)) * (_stage_width(view) + APART) - APART


def _cells(page: Page, view: View, left: float, width: float, tops: Sequence[float]) -> None:
    """Draws the grids of cells for each image and stage; a cell's colour shows its share in driving the gates."""
    stages = {stage: cell_shares(blocks) for stage, blocks in _stages(view.blocks).items()}
    bins = view.blocks[0].bins
    most = max(shares.max() for shares in stages.values())
    page.text(left, MARGIN, f"{view.label}: what drives the gates", fontweight="bold")
    page.scale(left + width, MARGIN, CELL_COLOURS, "0", f"{percent(most)} a cell")
    for s, (stage, shares) in enumerate(stages.items()):
        x = left + s * (_stage_width(view) + APART)
        page.text(x + _stage_width(view) / 2, MARGIN + HEAD - 0.28, stage, ha="center")
        for row, tile_top in zip(shares, tops, strict=False):
            top = tile_top + (TILE - SMALL) / 2
            for g, grid in enumerate(split_cells(row, bins)):
                at = x + g * (SMALL + CLOSE)
                axes = page.axes(at, top, SMALL, SMALL)
                axes.pcolormesh(grid, cmap=CELL_COLOURS, vmin=0, vmax=most, edgecolors="white", linewidth=0.6)
                axes.invert_yaxis()
                axes.spines[:].set(visible=True, color=GREY, linewidth=0.6)
                page.text(at + SMALL / 2, top - 0.21, f"{len(grid)}x{len(grid)}", ha="center", fontsize=9.5, color=GREY)
                page.text(at + SMALL / 2, top + SMALL + 0.05, percent(grid.sum()), ha="center", fontsize=9.5)


def _rows(view: View) -> int:
    """Returns the number of lines in the tallest strip; a stage's strip has one for each block and image."""
    return max(len(blocks) for blocks in _stages(view.blocks).values()) * len(view.images)


def _strip_height(view: View) -> float:
    return min(max(0.13 * _rows(view), 0.6), 3.5)


def _strips_height(view: View) -> float:
    return 0.9 + _strip_height(view) + 0.36


def _range(blocks: Sequence[BlockGates]) -> tuple[float, float, str, str]:
    """Returns the limits of the colour scale and their labels.

    Gates use the range 0 to 1. Factors that include a share are often very close to 1, so they use their own
    minimum and maximum.
    """
    if all(block.share is None for block in blocks):
        return 0, 1, "0, closed", "1, open"
    factors = np.concatenate([block.factor.ravel() for block in blocks])
    low, high = float(factors.min()), float(factors.max())
    decimals = 3 if high - low > 0.005 else 5
    return (low, high, f"{low:.{decimals}f}", f"{high:.{decimals}f}") if high > low else (0, 1, "0, closed", "1, open")


def _strips(page: Page, view: View, top: float) -> None:
    """Draws the gates of each stage: a column for each channel, a line for each block and image."""
    several = ", in each block one line for each image" if len(view.images) > 1 else ""
    low, high, *ends = _range(view.blocks)
    page.text(MARGIN, top + 0.12, f"{view.label}: {title(view.blocks)}", fontweight="bold")
    page.text(MARGIN, top + 0.35, f"a column for each channel{several}", fontsize=10, color=GREY)
    page.scale(page.width - MARGIN, top + 0.12, GATE_COLOURS, *ends)
    stages, height = _stages(view.blocks), _strip_height(view)
    label, gap = 0.6, 0.14
    width = (page.width - 2 * MARGIN + gap) / len(stages) - gap - label
    for s, (stage, blocks) in enumerate(stages.items()):
        left = MARGIN + s * (width + label + gap) + label
        axes = page.axes(left, top + 0.9, width, height)
        page.text(left + width / 2, top + 0.64, stage, ha="center")
        gates = [block.factor for block in blocks]
        channels = max(gate.shape[1] for gate in gates)
        padded = [np.pad(gate, ((0, 0), (0, channels - gate.shape[1])), constant_values=np.nan) for gate in gates]
        lines = np.concatenate(padded)
        axes.imshow(lines, cmap=GATE_COLOURS, vmin=low, vmax=high, aspect="auto", interpolation="nearest",
                    extent=(-0.5, channels - 0.5, len(lines), 0))  # fmt: skip
        each = len(view.images)
        for edge in range(1, len(blocks)):
            axes.axhline(edge * each, color="white", linewidth=1.2 if each > 1 else 0.6)
        shown = range(0, len(blocks), -(-len(blocks) // 8))
        names = [block.block.removeprefix(stage).lstrip("_") or "all" for block in blocks]
        axes.set_yticks([(i + 0.5) * each for i in shown], [names[i] for i in shown], fontsize=10)
        axes.set_xticks([0, channels // 2, channels - 1])
        axes.tick_params(length=2.5, labelsize=10)
