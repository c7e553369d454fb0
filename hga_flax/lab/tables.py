"""Formats a study's results for the terminal, or as Markdown, CSV or JSON."""

import csv
import io
import json
from collections import Counter
from typing import Any

from hga_flax.lab.comparison import is_finite
from hga_flax.lab.hardware import made_on
from hga_flax.lab.results import METRICS

FORMATS = ("terminal", "markdown", "csv", "json")
CSV_COLUMNS = (
    "row", "baseline", "seeds", "mean", "sd", "pairs", "difference", "low", "high", "half_width", "p", "p_holm",
    "verdict", "params", "gflops", "step_ms", "missing", "failed", "overrides",
)  # fmt: skip


def render(results: dict[str, Any], form: str) -> str:
    """Returns analysed results as text in one of `FORMATS`."""
    if form == "json":
        return json.dumps(results, indent=1) + "\n"
    if form == "csv":
        return _csv(results)
    header, rows = table(results)
    return _markdown(results, header, rows) if form == "markdown" else _terminal(results, header, rows)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and cells of the table for the terminal and Markdown."""
    digits = 4 if results["metric"] == "loss" else 2
    several = len({row["baseline"] for row in results["rows"]} - {None}) > 1
    header = ["row", "seeds", METRICS[results["metric"]], "difference"]
    header += ["to"] if several else []
    header += [f"{100 * results['confidence']:.0f} % interval", "p (Holm)", f"{results['metric'].split('_')[-1]} is"]
    small = max((row["gflops"] or 0.0 for row in results["rows"]), default=0.0) < 0.1
    header += ["parameters", "MFLOPs" if small else "GFLOPs"]
    timed = any(row["step_ms"] for row in results["rows"])
    header += ["step, ms"] if timed else []
    cells = []
    for row in results["rows"]:
        planned = len(row["runs"]) + len(row["missing"]) + len(row["failed"])
        spread = "" if row["sd"] is None else f" ± {row['sd']:.{digits}f}"
        line = [
            row["row"],
            f"{row['seeds']}" if row["seeds"] == planned else f"{row['seeds']} of {planned}",
            "-" if row["mean"] is None else f"{row['mean']:.{digits}f}{spread}",
            "" if row["difference"] is None else f"{row['difference']:+.{digits}f}",
        ]
        line += [row["baseline"] or ""] if several else []
        line += [
            "" if row["low"] is None else f"{row['low']:+.{digits}f} ... {row['high']:+.{digits}f}",
            "" if row["p_holm"] is None else probability(row["p_holm"]),
            row["verdict"],
            "" if row["params"] is None else f"{row['params']:,}",
            "" if row["gflops"] is None else f"{row['gflops'] * (1000 if small else 1):.4g}",
        ]
        line += ["" if row["step_ms"] is None else f"{row['step_ms']:.1f}"] if timed else []
        cells.append(line)
    return header, cells


def probability(p: float) -> str:
    """Returns a p-value with a sensible number of digits."""
    if p < 0.001:
        return "< 0.001"
    text = f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return text if text != "0.050" else f"{p:.5f}"  # at the threshold of the verdict, which side it is on


def notes(results: dict[str, Any]) -> list[str]:
    """Returns the notes below the table, each of one or two sentences."""
    rows = results["rows"]
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [
        f"Mean ± standard deviation over the seeds ({seeds}) of the last evaluation, never the best one. "
        f"Differences: {results['interval']}; p-values: {results['correction']}."
    ]
    widths = [row["half_width"] for row in rows if row["half_width"] is not None]
    if widths:
        unit = "" if results["metric"] == "loss" else " points"
        low, high = (f"{width:.2g}" for width in (min(widths), max(widths)))
        half = low if low == high else f"{low} to {high}"
        lines.append(f"Half an interval is {half}{unit}: smaller differences could not be seen.")
    if missing := sum(len(row["missing"]) for row in rows):
        lines.append(f"UNFINISHED: {missing} of {len(rows) * len(results['seeds'])} runs are not made yet.")
    metric = METRICS[results["metric"]].split(",")[0]
    lines += [
        f"Left out: {row['row']} seed {run['seed']}: its {metric} is not finite."
        for row in rows
        for run in row["runs"]
        if not is_finite(run.get(results["metric"]))
    ]
    lines += [f"{row['row']}: parameters not known: {row['uncounted']}" for row in rows if row.get("uncounted")]
    lines += [f"Failed: {row['row']} seed {f['seed']}: {f['error']}" for row in rows for f in row["failed"]]
    # Older versions wrote "cores" for the number of threads; count both as the same device.
    names = {}
    devices = Counter(
        names.setdefault(made.replace("CPU core", "CPU thread"), made)
        for row in rows
        for run in row["runs"]
        for made in [made_on(run)]
    )
    if len(devices) > 1:
        lines.append("MIXED: the runs were not all made on the same hardware, which alone changes the results.")
    versions = Counter(
        ", ".join(f"{name} {run[name]}" for name in ("jax", "hga_flax") if run.get(name))
        for row in rows
        for run in row["runs"]
    )
    if len(versions) > 1:
        made = ", ".join(f"{version or 'not recorded'} ({count} runs)" for version, count in versions.items())
        lines.append(f"MIXED: the runs were made with several versions, which may change the results: {made}.")
    data = Counter(run["data"] for row in rows for run in row["runs"] if run.get("data"))
    contents = Counter(line.partition(":")[0] for line in data)
    if changed := [f"{line} ({runs} runs)" for line, runs in data.items() if contents[line.partition(":")[0]] > 1]:
        lines.append(f"MIXED: the runs were not all made on the same classes and images: {'; '.join(changed)}.")
    lines += [
        f"{row['row']}: its difference is over the {row['pairs']} seeds that it has in common with its baseline, and "
        "so not the difference of the means shown."
        for row in rows
        if row.get("pairs") and row["pairs"] < max(_finished(row, results), _finished(_baseline(row, rows), results))
    ]
    if devices:
        lines.append("Made on: " + ", ".join(f"{device} ({count} runs)" for device, count in devices.items()) + ".")
    if (timed := results.get("timed_on")) and any(row["step_ms"] for row in rows):
        alike = not names or timed.replace("CPU core", "CPU thread") in names
        lines.append(f"Steps timed on: {timed}{'' if alike else ', other hardware than that of the runs'}.")
    return lines


def _finished(row: dict[str, Any] | None, results: dict[str, Any]) -> int:
    """Returns the number of runs of a row that its mean is over."""
    return sum(is_finite(run.get(results["metric"])) for run in row["runs"]) if row else 0


def _baseline(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((other for other in rows if other["row"] == row.get("baseline")), None)


def run_lines(results: dict[str, Any]) -> list[str]:
    """Returns a line for each run with its value, workdir and command."""
    lines = []
    for row in results["rows"]:
        for run in row["runs"]:
            value = run[results["metric"]]
            shown = "-" if value is None else f"{value:.4g}"
            lines.append(f"{row['row']:<16} seed {run['seed']:<3} {shown:>8}  {run['workdir']}  {run['command']}")
        lines += [f"{row['row']:<16} seed {seed:<3} {'-':>8}  not made yet" for seed in row["missing"]]
        lines += [f"{row['row']:<16} seed {f['seed']:<3} {'-':>8}  failed: {f['error']}" for f in row["failed"]]
    return lines


def _left(header: list[str]) -> set[str]:
    return {"row", "to"} | {name for name in header if name.endswith(" is")}


def _aligned(header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """Pads the cells; numbers are right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    left = _left(header)
    pad = lambda name, cell, width: cell.ljust(width) if name in left else cell.rjust(width)
    return [[pad(*part) for part in zip(header, line, widths, strict=True)] for line in lines]


def _terminal(results: dict[str, Any], header: list[str], rows: list[list[str]]) -> str:
    lines = [f"study {results['study']}" + (f": {results['about']}" if results["about"] else "")]
    lines += ["  ".join(line).rstrip() for line in _aligned(header, rows)]
    return "\n".join([*lines, *notes(results)]) + "\n"


def _markdown(results: dict[str, Any], header: list[str], rows: list[list[str]]) -> str:
    first, *rest = _aligned(header, rows)
    left = _left(header)
    rule = [
        "-" * len(cell) if name in left else "-" * (len(cell) - 1) + ":"
        for name, cell in zip(header, first, strict=True)
    ]
    lines = ["| " + " | ".join(line) + " |" for line in (first, rule, *rest)]
    return "\n".join([*lines, "", " ".join(notes(results))]) + "\n"


def _csv(results: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in results["rows"]:
        more = {
            "missing": " ".join(map(str, row["missing"])),
            "failed": " ".join(str(f["seed"]) for f in row["failed"]),
            "overrides": " ".join(row["overrides"]),
        }
        writer.writerow(row | more)
    return out.getvalue()
