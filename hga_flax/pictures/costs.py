"""Error against cost, as the paper argues: parameters, FLOPs and, where it was measured, the time of a step."""

import pathlib
from typing import Any

from hga_flax.pictures.style import COLOURS, MARKERS, save, styled

COSTS = {"params": ("parameters", 1), "gflops": ("MFLOPs an image", 1000), "step_ms": ("training step, ms", 1)}


def draw_costs(results: dict[str, Any], folder: pathlib.Path, metric: str) -> list[pathlib.Path]:
    """Draws mean and 95 % interval of each row over its costs.

    Args:
        results: analysed by hga_flax.lab.results.
        folder: where NAME.png and NAME.svg go; it is there.
        metric: what the errors are called.

    Returns:
        The files, none where no row has a result and a cost.

    Raises:
        UserError: they cannot be written.
    """
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if row["mean"] is not None]
    costs = [cost for cost in COSTS if any(row[cost] is not None for row in rows)]
    if not costs:
        return []
    width = 4.2 * len(costs) + 1.9
    with styled():
        figure = Figure(figsize=(width, 4.0))
        axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axis, cost in zip(axes, costs, strict=True):
            _panel(axis, rows, cost)
        axes[0].set_ylabel(metric)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="center right")
        made = ", unfinished" if any(row["missing"] for row in results["rows"]) else ""
        figure.suptitle(f"{results['study']}: mean of the seeds and its 95 % interval{made}", fontsize=11)
        figure.tight_layout(rect=(0, 0, 1 - 1.7 / width, 1))
        files = [folder / f"{results['study']}{form}" for form in (".png", ".svg")]
        save(figure, files)
    return files


def _panel(axis: Any, rows: list[dict[str, Any]], cost: str) -> None:
    title, scale = COSTS[cost]
    for i, row in enumerate(rows):
        if row[cost] is None:
            continue
        axis.errorbar(
            row[cost] * scale,
            row["mean"],
            yerr=_own_interval(row),
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=7,
            capsize=3,
            linewidth=1,
            label=row["row"],
        )
    axis.set_xlabel(title)
    axis.grid(alpha=0.25)
    axis.ticklabel_format(axis="x", style="plain", useOffset=False)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axis.locator_params(axis="x", nbins=5)


def _own_interval(row: dict[str, Any]) -> float | None:
    """Half of the t interval of a row's own mean; wider than the paired differences in the table."""
    from scipy import stats

    if row["sd"] is None:
        return None
    return float(stats.t.ppf(0.975, row["seeds"] - 1)) * row["sd"] / row["seeds"] ** 0.5
