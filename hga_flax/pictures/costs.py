"""Plots error against cost: parameters, FLOPs and, where measured, the time of a training step."""

import math
import pathlib
from typing import Any

from hga_flax.pictures.style import COLOURS, MARKERS, save, styled

COSTS = {"params": ("parameters", 1), "gflops": ("MFLOPs an image", 1000), "step_ms": ("training step, ms", 1)}
LETTER = 0.032  # height of a letter, as a fraction of the span of all intervals
SLOT = 0.42  # inches between two points, enough for a vertical name


def draw_costs(results: dict[str, Any], folder: pathlib.Path, metric: str) -> list[pathlib.Path]:
    """Draws each row's mean error and 95 % interval against its costs.

    Along each axis the rows are sorted by that cost and evenly spaced, labelled with name and cost. On a true
    scale, rows of nearly equal cost would overlap.

    Args:
        results: results analysed by hga_flax.lab.results.
        folder: existing folder for NAME.png and NAME.svg, where NAME is the study's.
        metric: label of the error axis.

    Returns:
        The files written; an empty list if no row has both a result and a cost.

    Raises:
        UserError: the files cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [(row, look(i)) for i, row in enumerate(results["rows"]) if row["mean"] is not None]
    costs = [cost for cost in COSTS if any(row[cost] is not None for row, _ in rows)]
    if not costs:
        return []
    with styled():
        figure = Figure(figsize=(len(costs) * max(3.2, SLOT * (len(rows) + 1)) + 0.8, 4.4))
        axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axis, cost in zip(axes, costs, strict=True):
            _panel(axis, rows, cost)
        axes[0].set_ylabel(metric)
        made = ", unfinished" if any(row["missing"] for row in results["rows"]) else ""
        figure.suptitle(f"{results['study']}: mean of the seeds and its 95 % interval{made}", fontsize=11)
        figure.tight_layout()
        figure.align_xlabels(axes)
        files = [folder / f"{results['study']}{form}" for form in (".png", ".svg")]
        save(figure, files)
    return files


def look(index: int) -> dict[str, str]:
    """Returns the marker and colour of a study's row by its index; the first 84 combinations are distinct."""
    turn = index // len(MARKERS)
    return {"marker": MARKERS[index % len(MARKERS)], "color": COLOURS[(index + turn) % len(COLOURS)]}


def _panel(axis: Any, rows: list[tuple[dict[str, Any], dict[str, str]]], cost: str) -> None:
    title, scale = COSTS[cost]
    known = lambda row: math.inf if row[cost] is None else row[cost]  # those without a cost come last
    rows = sorted(rows, key=lambda pair: (known(pair[0]), pair[0]["mean"]))
    ends = [row["mean"] + sign * (_own_interval(row) or 0) for row, _ in rows for sign in (-1, 1)]
    middle, span = (min(ends) + max(ends)) / 2, max(ends) - min(ends) or 1.0
    for place, (row, style) in enumerate(rows):
        half = _own_interval(row)
        axis.errorbar(place, row["mean"], yerr=half, markersize=7, capsize=3, linewidth=1, linestyle="", **style)
        up = 1 if row["mean"] < middle else -1  # towards the middle, where there is room
        ends.append(row["mean"] + up * ((half or 0) + span * (0.05 + LETTER * len(row["row"]))))
        axis.annotate(
            row["row"],
            (place, row["mean"] + up * (half or 0)),
            xytext=(0, up * (5 if half else 8)),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="bottom" if up > 0 else "top",
            fontsize=9,
            color=style["color"],
        )
    margin = 0.6 + max(0, 4 - len(rows)) / 2  # on both sides; a few rows stand in the middle
    axis.set_xlim(-margin, len(rows) - 1 + margin)
    axis.set_ylim(min(ends) - 0.03 * span, max(ends) + 0.03 * span)
    number = lambda value: f"{value:,{'.4g' if value < 1000 else '.0f'}}"  # no powers of ten
    shown = ["unknown" if row[cost] is None else number(row[cost] * scale) for row, _ in rows]
    axis.set_xticks(range(len(rows)), shown)
    axis.tick_params(axis="x", rotation=60)
    axis.set_xlabel(f"{title} (in order, not to scale)")
    axis.grid(axis="y", alpha=0.25)


def _own_interval(row: dict[str, Any]) -> float | None:
    """Returns half the t interval of a row's own mean; it is wider than that of the paired differences in the table."""
    from scipy import stats

    if row["sd"] is None:
        return None
    return float(stats.t.ppf(0.975, row["seeds"] - 1)) * row["sd"] / row["seeds"] ** 0.5
