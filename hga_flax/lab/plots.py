"""Error against cost, as the paper argues: parameters, FLOPs and, where it was measured, the time of a step."""

import pathlib
from typing import Any

from hga_flax.errors import UserError
from hga_flax.lab.results import METRICS

COSTS = {"params": ("parameters", 1), "gflops": ("MFLOPs an image", 1000), "step_ms": ("training step, ms", 1)}
# Okabe and Ito's colours, which all readers can tell apart; the marker tells rows apart without colour.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8A7B00")
MARKERS = "osD^vP*X<>hp"
FORMATS = ("png", "svg")


def plot(results: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws mean and 95 % interval of each row over its costs.

    Args:
        results: analysed.
        folder: where NAME.png and NAME.svg go.

    Returns:
        The files, none where no row has a result and a cost.

    Raises:
        UserError: they cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["mean"] is not None]
    costs = [cost for cost in COSTS if any(row[cost] is not None for row in rows)]
    if not costs:
        return []
    width = 4.2 * len(costs) + 1.9
    settings = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "hga_flax"}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(1, len(costs), figsize=(width, 4.0), sharey=True, squeeze=False)
        for axis, cost in zip(axes[0], costs, strict=True):
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
        axes[0][0].set_ylabel(METRICS[results["metric"]])
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="center right", frameon=False)
        made = ", unfinished" if any(row["missing"] for row in results["rows"]) else ""
        figure.suptitle(f"{results['study']}: mean of the seeds and its 95 % interval{made}", fontsize=10)
        figure.tight_layout(rect=(0, 0, 1 - 1.6 / width, 1))
        files = [folder / f"{results['study']}.{form}" for form in FORMATS]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be written: {error.strerror}") from None
        finally:
            pyplot.close(figure)
    return files


def _own_interval(row: dict[str, Any]) -> float | None:
    """Half of the t interval of a row's own mean; wider than the paired differences in the table."""
    from scipy import stats

    if row["sd"] is None:
        return None
    return float(stats.t.ppf(0.975, row["seeds"] - 1)) * row["sd"] / row["seeds"] ** 0.5
