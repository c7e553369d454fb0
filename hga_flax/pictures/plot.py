"""`python -m hga_flax plot`: draws the loss and error curves of one or several runs.

    plot WORKDIR... [--out=curves] [--metric=loss,top1_error] [--x=step|epoch] [--log] [--label=NAME ...]

Evaluation curves are bold with markers, training curves are thin. If the paper's tables contain the run's network,
attention and data set, a dashed line shows their value. `--out` without a suffix writes a PNG and an SVG.
"""

import argparse
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hga_flax.errors import UserError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hga_flax.pictures.curves import Run

AXES = {"loss": "loss (nats)", "top1_error": "top-1 error (%)", "top5_error": "top-5 error (%)"}
# (largest number of decades on a logarithmic axis, multiples labelled in each decade)
TICKS = (
    (0.7, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)),
    (1.3, (1, 1.5, 2, 3, 4, 6, 8)),
    (2, (1, 2, 3, 5)),
    (2.7, (1, 2, 5)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="folder of a run")
    parser.add_argument(
        "--out",
        default="curves",
        metavar="PATH",
        help="output file: .png, .svg or .pdf; without a suffix, both PNG and SVG (default: curves)",
    )
    parser.add_argument(
        "--metric",
        default="loss,top1_error",
        metavar="NAMES",
        help="metrics, separated by commas (default: loss,top1_error)",
    )
    parser.add_argument(
        "--x",
        choices=("step", "epoch"),
        default="step",
        help="horizontal axis (default: step); epoch needs the data set",
    )
    parser.add_argument("--log", action="store_true", help="logarithmic vertical axis; zeros are omitted")
    parser.add_argument(
        "--label", action="append", metavar="NAME", help="legend label of a run; repeat in the order of the runs"
    )


def run(arguments: argparse.Namespace) -> None:
    """Draws and saves the curves, and prints each run's last and best values.

    Raises:
        UserError: a run has no curves, no run has a requested metric, or the picture cannot be written.
    """
    labels = arguments.label or [None] * len(arguments.workdirs)
    if len(labels) != len(arguments.workdirs):
        raise UserError(f"--label: {len(labels)} for {len(arguments.workdirs)} runs; give one for each")
    for i, path in enumerate(arguments.workdirs):
        if any(os.path.realpath(path) == os.path.realpath(other) for other in arguments.workdirs[:i]):
            raise UserError(f"{path}: given twice; a run is drawn once")
    from hga_flax.pictures.curves import read_run, with_folders
    from hga_flax.pictures.style import output_files, save, styled
    from hga_flax.runs.console import Console

    files = output_files(arguments.out)
    runs = [
        read_run(path, label, arguments.x == "epoch") for path, label in zip(arguments.workdirs, labels, strict=True)
    ]
    runs = with_folders(runs, arguments.workdirs, labels)
    metrics = [name.strip() for name in arguments.metric.split(",")]
    known = sorted({name.partition("/")[2] for run in runs for name in run.curves})
    for metric in metrics:
        if metric not in known:
            raise UserError(
                f"--metric={metric}: no run logged it{nearest(metric, known)}; there are: {', '.join(known)}"
            )
    with styled():
        save(draw(runs, metrics, arguments.x, arguments.log), files)
    console = Console()
    console.columns("evaluation", ("run", "step", *(f"{AXES.get(m, m)}, last (best)" for m in metrics)),
                    [table_row(run, metrics) for run in runs])  # fmt: skip
    for run in runs:
        if run.damaged:
            console.line(f"{run.label}: {run.damaged} damaged line{'s' * (run.damaged > 1)} of metrics.jsonl left out")
        if run.other_loss and "loss" in metrics:
            console.line(f"{run.label}: its training loss is {run.other_loss}, unlike the evaluation's: not drawn")
    console.line("written: " + ", ".join(map(str, files)))


def table_row(run: "Run", metrics: Sequence[str]) -> tuple[str, ...]:
    """Returns a run's label, its last step, and "last (best)" of the evaluations for each metric."""
    row = [run.label, f"{max(curve.steps[-1] for curve in run.curves.values()):,}"]
    for metric in metrics:
        values = run.curve(f"eval/{metric}")[1]
        finite = [value for value in values if not math.isnan(value)]
        row.append(f"{values[-1]:.4g} ({min(finite):.4g})" if finite else "-")
    return tuple(row)


def draw(runs: Sequence["Run"], metrics: Sequence[str], x: str, log: bool) -> "Figure":
    """Returns the figure: a panel for each metric and one legend above. Call inside `styled()`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from hga_flax.pictures.style import COLOURS, GREY, LINES, MARKERS

    rows = -(-len(metrics) // 2)
    width = 9.2 if len(metrics) > 1 else 6.0  # inches
    figure = Figure(figsize=(width, 0.6 + 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, min(2, len(metrics)), squeeze=False).flat
    looks = [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
        for i in range(len(runs))
    ]
    for axes, metric in zip(panels, metrics, strict=False):
        for run, look in zip(runs, looks, strict=True):
            if not (metric == "loss" and run.other_loss):
                axes.plot(*run.curve(f"train/{metric}"), color=look["color"], linewidth=0.9, alpha=0.7, zorder=2)
            axes.plot(*run.curve(f"eval/{metric}"), **look, linewidth=2.2, markersize=5.5, markeredgecolor="white",
                      markeredgewidth=0.6, zorder=3)  # fmt: skip
        _paper_lines(axes, runs, [look["color"] for look in looks], metric)
        _axes(axes, metric, x, log)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], **look, linewidth=2.2, markersize=5.5) for look in looks]
    handles += [Line2D([], [], color=GREY, linewidth=0.9), Line2D([], [], color=GREY, linewidth=2.2, marker="o")]
    others = sorted({run.other_loss for run in runs if run.other_loss and "loss" in metrics})
    thin = "thin: training" + (f" (loss: not {', '.join(others)})" if others else "")
    names = [*(run.label for run in runs), thin, "bold: evaluation"]
    longest = max(map(len, names))
    columns = max(1, min(len(names), int(12 * width) // (longest + 8)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=3.2)
    return figure


def _paper_lines(axes: "Axes", runs: Sequence["Run"], colours: Sequence[str], metric: str) -> None:
    """Draws each of the paper's values once, as a line labelled with its value at the right end."""
    drawn = set()
    for run, colour in zip(runs, colours, strict=True):
        paper = run.paper.get(metric)
        if paper is not None and paper not in drawn:
            drawn.add(paper)
            axes.axhline(paper.value, color=colour, linewidth=1.3, linestyle=(0, (8, 4)), zorder=1)
            axes.annotate(
                f"paper, {paper.table}: {paper.value:.2f} %", (1, paper.value), xycoords=axes.get_yaxis_transform(),
                xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=9.5, color=colour,
            )  # fmt: skip


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _axes(axes: "Axes", metric: str, x: str, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xlabel(x)
    axes.set_ylabel(AXES.get(metric, metric.replace("_", " ")))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(axis="y", color="#d9dee3", linewidth=0.7)
    axes.set_axisbelow(True)
    if log and any(value > 0 for line in axes.get_lines() for value in line.get_ydata()):
        axes.set_yscale("log", nonpositive="mask")
        low, high = axes.get_ylim()
        # As many labels as fit: the fewer decades, the more labels in each.
        subs = next((subs for decades, subs in TICKS if high < 10**decades * low), (1,))
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif metric in AXES:
        # matplotlib adds no margin around a single point.
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1.05 * _finite(axes.dataLim.ymax)))
    axes.set_xlim(right=max(axes.get_xlim()[1], 1.05 * _finite(axes.dataLim.xmax)))
