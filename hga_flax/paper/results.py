"""Our own errors: the runs that were made, each with its command, as `results/paper.json`.

The file is a list of objects with these keys, and no others:

    model              a name of `create_model`, as in the paper's rows: "resnet50", ...
    attention          "none", "hga", "hga_table2", "se", "sk"
    attention_options  optional; options that differ from the defaults, such as {"kernels": [7]}
    dataset            "imagenet2012", "cifar10" or "cifar100"
    top1_error         in %, over the whole validation set
    top5_error         optional, in %
    command            what was run, so that another can run it again

A row's errors appear beside the paper's in every table that has this network. `form` does not tell
rows apart, for the two forms of HGA are equal; HGA without its three stages is "none".
"""

import json
import pathlib
from typing import Any

from hga_flax.attention import attention_options
from hga_flax.attention.registry import check_attention
from hga_flax.errors import UserError

DEFAULT_FILE = pathlib.Path("results/paper.json")
REQUIRED = {"model", "attention", "dataset", "top1_error", "command"}
OPTIONAL = {"attention_options", "top5_error"}
STAGES = ("mfe", "hap", "ee")

Key = tuple[str, str, str, str]


def network_key(model: str, attention: str, options: dict[str, Any], dataset: str) -> Key:
    """Returns what tells the networks of the tables apart; equal networks have equal keys.

    Raises:
        ValueError: no such attention, or it has no such option.
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
    """Reads a file of results; without a `path`, `DEFAULT_FILE` if it exists.

    Args:
        path: the file, or None.
        known: keys of the tables' rows.

    Raises:
        UserError: the file cannot be read, a row is malformed, names no row of the tables, or
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
            raise UserError(f"{where}: '{name}' must be a text that is not empty")
    for name in ("top1_error", "top5_error"):
        value = row.get(name, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
            raise UserError(f"{where}: '{name}' is {value!r}, not a percentage")
    try:
        check_attention(row["attention"])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    options = row.get("attention_options", {})
    if not isinstance(options, dict):
        raise UserError(f"{where}: 'attention_options' must be an object")
    try:
        return network_key(row["model"], row["attention"], options, row["dataset"])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
