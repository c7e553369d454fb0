"""`python -m hga_flax paper TABLE`: the paper's figures, ours, and the difference.

Our costs are counted from the traced networks (`complexity.py`). Our errors are read from a results
file (`results.py`); networks without an entry there show "not run".
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from hga_flax.attention import HGA, attention_options
from hga_flax.counting.complexity import Complexity, complexity
from hga_flax.errors import UserError, expand
from hga_flax.models import create_model
from hga_flax.paper.equations import compare_equations
from hga_flax.paper.published import CONVOLUTIONS, NOTES, TABLE1, TABLES, Row
from hga_flax.paper.results import network_key, read_results

CHOICES = ("table1", *TABLES, "equations", "all")
DATASETS = {"imagenet2012": ((224, 224, 3), 1000), "cifar10": ((32, 32, 3), 10), "cifar100": ((32, 32, 3), 100)}
EQUATION_CHANNELS = (32, 64, 256)
EQUATION_SIZE = (56, 56)
WITHOUT_RESULTS = ("table1", "equations")
EQUAL_EQUATIONS = ("8", "9", "10", "12")  # Eq. 11 includes Eq. 9, which counts a quarter of the pooling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("table", choices=CHOICES, metavar="TABLE", help="one of: " + ", ".join(CHOICES))
    parser.add_argument("--json", action="store_true", help="print a list of rows as JSON instead")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="JSON file with the errors of our runs (default: results/paper.json if it exists)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the tables; returns 1 if an equation that must match the count does not, else 0.

    Raises:
        UserError: the results file is invalid.
    """
    if arguments.results is not None and arguments.table in WITHOUT_RESULTS:
        raise UserError(f"--results={arguments.results}: {arguments.table} shows no errors of networks")
    file = None if arguments.results is None else expand(arguments.results, "--results")
    jax.config.update("jax_platforms", "cpu")  # tracing needs no accelerator, so do not occupy one
    chosen = CHOICES[:-1] if arguments.table == "all" else (arguments.table,)
    rows: list[dict[str, Any]] = []
    for table in chosen:
        table_rows = make_rows(table, file)
        rows += table_rows
        if not arguments.json:
            from hga_flax.paper.view import print_table  # --json does not need rich

            print_table(table, table_rows)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return int(any(row.get("equation") in EQUAL_EQUATIONS and row["difference"] for row in rows))


def make_rows(table: str, results_file: pathlib.Path | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a table as JSON-ready dictionaries.

    Every row has `table`, `model`, `attention`, `attention_options`, `params`, `conv_fc_macs`,
    `bn_elements`, `gflops` (conv + fc + 2 BatchNorm, in 1e9) and the paper's `paper_params_m`,
    `paper_gflops` and `paper_top1_error` (None if the paper does not print it).

    Args:
        table: one of `CHOICES` except "all".
        results_file: path of the results file, see `read_results`.

    Raises:
        UserError: the results file is invalid.
    """
    if table == "table1":
        return [row for model, attention in TABLE1 for row in _architecture_rows(model, attention)]
    if table == "equations":
        return [row for channels in EQUATION_CHANNELS for row in _equation_rows(channels)]
    results = read_results(results_file, {_key(row) for _, rows in TABLES.values() for row in rows()})
    return [_network_row(row, results.get(_key(row), {})) for row in TABLES[table][1]()]


def _key(row: Row) -> tuple[str, str, str, str]:
    return network_key(row.model, row.attention, row.options, row.dataset)


@functools.cache
def _counted(model: str, attention: str, options: str, dataset: str) -> Complexity:
    image_shape, classes = DATASETS[dataset]
    network = create_model(model, attention=attention, attention_options=json.loads(options), num_classes=classes)
    return complexity(network, image_shape)


def count(model: str, attention: str, options: dict[str, Any], dataset: str = "imagenet2012") -> Complexity:
    """Counts a network's cost; cached, since several tables share a network."""
    return _counted(model, attention, json.dumps(attention_options(attention) | options, sort_keys=True), dataset)


def _figures(model: str, attention: str, options: dict[str, Any], dataset: str = "imagenet2012") -> dict[str, Any]:
    identity = {"model": model, "attention": attention, "attention_options": options, "dataset": dataset}
    return identity | _costs(count(model, attention, options, dataset))


def _costs(counted: Complexity) -> dict[str, Any]:
    return {
        **dataclasses.asdict(counted),
        "gflops": counted.gflops,
        "gflops_with_pooling": counted.thop_total / 1e9,
        "paper_params_m": None,
        "paper_gflops": None,
        "paper_top1_error": None,
    }


def _network_row(row: Row, result: dict[str, Any]) -> dict[str, Any]:
    figures = _figures(row.model, row.attention, row.options, row.dataset)
    shift = None
    if "form" in row.options and row.table in ("table2", "table3", "table4"):
        options = {name: value for name, value in row.options.items() if name != "form"}
        shift = count(row.model, row.attention, options, row.dataset).gflops
    ours = figures["conv_fc_macs"] / 1e9 if "sk" in row.notes else figures["gflops"]
    return {
        "table": row.table,
        "label": row.label,
        **figures,
        "gflops_shift": shift,  # GFLOPs of the default form, where it differs; not traced for the ablations
        "paper_params_m": row.params_m,
        "params_m_difference": None if row.params_m is None else figures["params"] / 1e6 - row.params_m,
        "paper_gflops": row.gflops,
        "gflops_difference": None if row.gflops is None else ours - row.gflops,
        "paper_top1_error": row.top1_error,
        "paper_top1_delta": row.top1_delta,
        "top1_error": result.get("top1_error"),
        "paper_top5_error": row.top5_error,
        "top5_error": result.get("top5_error"),
        "command": result.get("command"),
        "notes": [NOTES[note] for note in row.notes],
    }


def _equation_rows(channels: int) -> list[dict[str, Any]]:
    height, width = EQUATION_SIZE
    module = HGA(channels, reduced_channels=None, **CONVOLUTIONS)
    identity = {"model": f"HGA({channels})", "attention": "hga", "attention_options": CONVOLUTIONS}
    figures = identity | _costs(complexity(module, (height, width, channels)))
    rows = []
    for compared in compare_equations(height, width, channels):
        rows.append(
            {
                "table": "equations",
                **figures,
                "equation": compared.equation,
                "what": compared.what,
                "height": height,
                "width": width,
                "channels": channels,
                "paper": compared.paper,
                "counted": compared.counted,
                "difference": compared.counted - compared.paper,
                "notes": [compared.note] if compared.note else [],
            }
        )
    return rows


def _architecture_rows(model: str, attention: str) -> list[dict[str, Any]]:
    """Returns the rows of Table 1: the stages as printed and as found in the traced parameters."""
    network = create_model(model, attention=attention)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    traced = jax.eval_shape(
        lambda images: network.init(jax.random.key(0), images, mutable=True, capture_intermediates=True), images
    )
    rows = []
    for stage, (size, widths, hga, blocks) in enumerate(TABLE1[model, attention], start=1):
        names = [name for name in traced["params"] if name.startswith(f"stage{stage}_block")]
        block = traced["params"][names[0]]
        kernels = [block[f"conv{i}"]["kernel"].shape for i in (1, 2, 3)]
        ours = None
        if attention != "none":
            ours = [*block["attention"]["reduce"]["kernel"].shape, block["attention"]["restore"]["kernel"].shape[-1]]
        rows.append(
            {
                "table": "table1",
                **_figures(model, attention, {}),
                "stage": stage,
                "paper_output_size": size,
                "output_size": traced["intermediates"][names[0]]["__call__"][0].shape[1],
                "paper_layers": _layers(zip((1, 3, 1), widths, strict=True), hga),
                "layers": _layers(((kernel[0], kernel[-1]) for kernel in kernels), ours),
                "paper_blocks": blocks,
                "blocks": len(names),
                "notes": [NOTES["blocks"]] if len(names) != blocks else [],
            }
        )
    return rows


def _layers(convolutions: Any, hga: Any) -> list[str]:
    layers = [f"{kernel}x{kernel}, {width}" for kernel, width in convolutions]
    return layers if hga is None else [*layers, f"HGA({', '.join(map(str, hga))})"]
