"""Prints the paper's tables in the terminal."""

import textwrap
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hga_flax.paper.published import ABSTRACT, NETWORKS, TABLES, averages

# A gap is printed between rows where these keys change.
GROUPS = {
    "table1": ("model", "attention"),
    "table2": ("model",),
    "table3": ("attention",),
    "table4": ("dataset", "attention"),
    "table5": ("model",),
    "table6": ("model",),
    "equations": ("channels",),
}

SHIFT = "\nshift"

Rows = list[dict[str, Any]]
Column = tuple[str, Callable[[dict[str, Any]], str]]


def print_table(table: str, rows: Rows) -> None:
    """Prints the rows of `command.make_rows(table)` with their notes below."""
    titles = {"table1": "HGA in ResNet-50 and ResNeXt-50", "equations": "Cost of HGA(C) on a map of 56x56"}
    titles |= {name: title for name, (title, _) in TABLES.items()}
    heading = "Equations" if table == "equations" else f"Table {table[-1]}"
    makers = {"table1": _architecture_columns, "equations": _equation_columns}
    columns = makers.get(table, _network_columns)(rows)

    view = Table(box=box.SIMPLE_HEAD, padding=(0, 0), title=f"{heading}. {titles[table]}", title_justify="left")
    for header, _ in columns:
        left = header in ("network", "attention", "stages", "kernels", "dataset", "what") or "layers" in header
        view.add_column(header, justify="left" if left else "right", no_wrap=True)
    view.add_column("note", no_wrap=True)
    notes = list(dict.fromkeys(note for row in rows for note in row["notes"]))
    previous = None
    for row in rows:
        group = tuple(row[key] for key in GROUPS[table])
        if previous not in (None, group):
            view.add_section()
        previous = group
        marks = ",".join(_mark(notes.index(note)) for note in row["notes"])
        view.add_row(*(value(row) for _, value in columns), marks)

    console = Console()
    # Let a narrow terminal wrap the lines; rich would truncate the cells.
    needed = console.measure(view, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, needed)
    console.print(view)
    for i, note in enumerate(notes):
        lines = textwrap.fill(note, needed, initial_indent=f"  {_mark(i)}  ", subsequent_indent=" " * 5)
        console.print(lines, highlight=False)
    if any(header == SHIFT for header, _ in columns):
        console.print("  shift: the same network in its default form, by shift pooling", highlight=False)
    if table == "table2":
        _print_averages(console, rows)
    console.print()


def _mark(index: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[index]


def _number(key: str, decimals: int = 2, scale: float = 1, *, signed: bool = False) -> Callable[[dict[str, Any]], str]:
    def text(row: dict[str, Any]) -> str:
        value = row[key]
        return "" if value is None else f"{value / scale:{'+' if signed else ''}.{decimals}f}"

    return text


def _error(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "not run" if row[key] is None else f"{row[key]:.2f}"


def _network_columns(rows: Rows) -> list[Column]:
    table = rows[0]["table"]
    columns: list[Column] = [
        ("network", lambda row: NETWORKS[row["model"]]),
        ("attention", lambda row: row["attention"]),
    ]
    label = {"table4": "dataset", "table5": "stages", "table6": "kernels"}.get(table)
    if label:
        columns.append((label, lambda row: row["label"] or "none"))
    if any(row["paper_params_m"] is not None for row in rows):
        columns += [
            ("params M\npaper", _number("paper_params_m")),
            ("\nours", _number("params", 3, 1e6)),
            ("\ndiff", _number("params_m_difference", 3, signed=True)),
        ]
    else:
        columns.append(("params M\nours", _number("params", 3, 1e6)))
    columns.append(("conv+fc\nG MAC", _number("conv_fc_macs", 3, 1e9)))
    if any(row["paper_gflops"] is not None for row in rows):
        columns += [
            ("GFLOPs\npaper", _number("paper_gflops")),
            ("\nours", _number("gflops", 3)),
            ("\ndiff", _number("gflops_difference", 3, signed=True)),
        ]
    else:
        columns.append(("GFLOPs\nours", _number("gflops", 3)))
    if any(row["gflops_shift"] is not None for row in rows):
        columns.append((SHIFT, _number("gflops_shift", 3)))
    columns += [("top-1 %\npaper", _number("paper_top1_error")), ("\nours", _error("top1_error"))]
    if any(row["paper_top5_error"] is not None for row in rows):
        columns += [("top-5 %\npaper", _number("paper_top5_error")), ("\nours", _error("top5_error"))]
    return columns


def _equation_columns(rows: Rows) -> list[Column]:
    return [
        ("equation", lambda row: row["equation"]),
        ("what", lambda row: row["what"]),
        ("C", lambda row: str(row["channels"])),
        ("paper", lambda row: f"{row['paper']:,}"),
        ("counted", lambda row: f"{row['counted']:,}"),
        ("difference", lambda row: f"{row['difference']:+,}" if row["difference"] else "equal"),
    ]


def _architecture_columns(rows: Rows) -> list[Column]:
    def stage(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: " | ".join(row[key])

    return [
        ("network", lambda row: NETWORKS[row["model"]]),
        ("attention", lambda row: row["attention"]),
        ("output\npaper", lambda row: str(row["paper_output_size"])),
        ("\nours", lambda row: str(row["output_size"])),
        ("layers of a block, paper", stage("paper_layers")),
        ("ours", lambda row: "equal" if row["layers"] == row["paper_layers"] else " | ".join(row["layers"])),
        ("blocks\npaper", lambda row: str(row["paper_blocks"])),
        ("\nours", lambda row: str(row["blocks"])),
    ]


def _print_averages(console: Console, rows: Rows) -> None:
    computed = averages()
    names = {"top1_error": "top-1 error falls by", "top5_error": "top-5 error falls by", "gflops": "FLOPs grow by"}
    console.print("  The abstract's averages are ratios of sums over the five networks:", highlight=False)
    for key, name in names.items():
        console.print(f"     {name:<21} {ABSTRACT[key]:5.2f} %   recomputed {computed[key]:.3f} %", highlight=False)
    total = {name: sum(row["gflops"] for row in rows if row["attention"] == name) for name in ("none", "hga")}
    growth = 100 * (total["hga"] / total["none"] - 1)
    console.print(f"     FLOPs of ours (hga) grow by {growth:.3f} %", highlight=False)
