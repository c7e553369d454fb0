"""Reads our own results, `results/paper.json`: the error of each finished run and its command.

The file is a list of objects with exactly these keys:

    model              a name of `create_model`, as in the paper's rows: "resnet50", ...
    attention          "none", "hga", "hga_table2", "se", "sk"
    attention_options  optional; non-default options, such as {"kernels": [7]}
    dataset            "imagenet2012", "cifar10" or "cifar100"
    top1_error         in %, over the whole validation set
    top5_error         optional, in %
    command            the command that reproduces the run

The errors are shown next to the paper's in every table that contains the network. `form` is ignored
when matching rows, because the two forms of HGA are equivalent; HGA without its three stages counts as "none".
"""

import json
import pathlib
from typing import Any

from hga_flax.attention import attention_options
from hga_flax.errors import UserError

DEFAULT_FILE = pathlib.Path("results/paper.json")
REQUIRED = {"model", "attention", "dataset", "top1_error", "command"}
OPTIONAL = {"attention_options", "top5_error"}
STAGES = ("mfe", "hap", "ee")

Key = tuple[str, str, str, str]


def network_key(model: str, attention: str, options: dict[str, Any], dataset: str) -> Key:
    """Returns the key that identifies a network of the tables; equal networks have equal keys.

    Raises:
        ValueError: unknown attention, or an option the attention does not have.
    """
    known = attention_options(attention)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"attention '{attention}' has no option '{unknown[0]}'; it has: {', '.join(known) or 'none'}")
    full = known | options
    full.pop("form", None)
    if attention == "hga" and not any(full[stage] for stage in STAGES):
        attention, full = "none", {}
    return model, attention, json.dumps(full, sort_keys=True), dataset


def read_results(path: pathlib.Path | None, known: set[Key]) -> dict[Key, dict[str, Any]]:
    """Reads a results file into a dictionary from network key to row.

    Args:
        path: the file; None reads `DEFAULT_FILE`, or returns {} if it does not exist.
        known: the keys of the tables' rows.

    Raises:
        UserError: the file cannot be read, or a row is malformed, matches no row of the tables, or
            repeats another.
    """
    if path is None and not DEFAULT_FILE.exists():
        return {}
    path = path or DEFAULT_FILE
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read results file {path}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"results file {path} must hold a list of objects")
    results: dict[Key, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        key = _checked(row, f"results file {path}, row {number}")
        if key not in known:
            raise UserError(f"results file {path}, row {number}: the paper's tables have no such network")
        if key in results:
            raise UserError(f"results file {path}, row {number} repeats the network of an earlier row")
        results[key] = row
    return results


def _checked(row: dict[str, Any], where: str) -> Key:
    if missing := sorted(REQUIRED - set(row)):
        raise UserError(f"{where} lacks '{missing[0]}'")
    if unknown := sorted(set(row) - REQUIRED - OPTIONAL):
        raise UserError(f"{where} has '{unknown[0]}', which is none of {', '.join(sorted(REQUIRED | OPTIONAL))}")
    for name in ("model", "attention", "dataset", "command"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"{where}: '{name}' must be a string that is not empty")
    for name in ("top1_error", "top5_error"):
        value = row.get(name, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
            raise UserError(f"{where}: '{name}' is {value!r}, not a percentage")
    options = row.get("attention_options", {})
    if not isinstance(options, dict):
        raise UserError(f"{where}: 'attention_options' must be an object")
    try:
        return network_key(row["model"], row["attention"], options, row["dataset"])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
