"""Collects the results of a study from its folder or from a saved report, and compares its rows."""

import json
import pathlib
import shlex
import zlib
from collections.abc import Sequence
from typing import Any

from hga_flax.config.checks import complete
from hga_flax.config.command_line import import_flags, imported_modules
from hga_flax.config.loading import build_model, from_json
from hga_flax.data.sources import DatasetInfo, dataset_info
from hga_flax.errors import UserError, expand, nearest, one_line
from hga_flax.lab import comparison
from hga_flax.lab.hardware import made_on
from hga_flax.lab.runs import command, read_json, record
from hga_flax.lab.study import check_same_rows, fingerprint, load_study
from hga_flax.runs.workdir import read_dataset

METRICS = {"top1_error": "top-1 error, %", "top5_error": "top-5 error, %", "loss": "loss, nats"}
RUN_KEYS = ("seed", "top1_error", "top5_error", "loss", "step", "seconds", "device", "devices", "threads")
RUN_KEYS += ("jax", "hga_flax")
STEP_TIMES = "{study}.step_times.json"  # one file per study: only rows that took turns are comparable


def load(
    study: str, directory: str | None = None, scale: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Collects a study's results, without comparing them.

    Args:
        study: a study file, the folder of one study, or a report's JSON.
        directory: the study's folder; None uses the one in the study file.
        scale: one of the study file's scales; None uses the first, if there are any.
        overrides: the overrides for all rows with which the study was run.

    Returns:
        The study's `study`, `about`, `config`, `file`, `seeds`, `timed_on` (hardware) and `rows`, and each row's
        `row`, `overrides`, `baseline`, `runs`, `missing` (seeds), `failed`, `params`, `gflops` and `step_ms`; where
        the parameters of a begun row cannot be counted, `uncounted` says why.

    Raises:
        UserError: there is no such study, or part of it cannot be read.
    """
    path = expand(study, "STUDY")
    if path.suffix != ".json":
        return _gather(*locate(study, directory, scale, overrides))
    for flag in [f"--dir={directory}"] * bool(directory) + [f"--scale={scale}"] * bool(scale) + list(overrides):
        raise UserError(f"{flag}: only for a study file; {study} is a saved report")
    if is_record(path):
        raise UserError(f"{study} is the record of a study, not a saved report: name its folder, {path.parent}")
    return _saved(path)


def locate(
    study: str, directory: str | None = None, scale: str | None = None, overrides: Sequence[str] = ()
) -> tuple[str, dict[str, Any], pathlib.Path]:
    """Returns a study's name, its description and its folder; the arguments are those of `load`.

    Raises:
        UserError: there is no such study, or it is a saved report, which has no folder.
    """
    path = expand(study, "STUDY")
    if path.suffix == ".json":
        raise UserError(f"{study}: a saved report has no runs; name the study's file or its folder")
    if path.is_dir():
        for flag in [f"--dir={directory}"] * bool(directory) + [f"--scale={scale}"] * bool(scale) + list(overrides):
            raise UserError(f"{flag}: only for a study file; {study} is the folder of a single study")
        return _described(path)
    loaded = load_study(study, directory, check=False, scale=scale, overrides=overrides)
    check_same_rows(loaded)
    if not loaded.directory.is_dir():
        named = [f"--scale={scale}"] * bool(scale) + [f"--dir={directory}"] * bool(directory)
        flags = shlex.join([study, *named, *import_flags(), *overrides])
        raise UserError(f"{loaded.directory}: no runs yet; start python -m hga_flax study {flags}")
    recorded = read_json(loaded.directory / f"{loaded.name}.json") or {}
    return loaded.name, record(loaded) | {"imports": recorded.get("imports", [])}, loaded.directory


def is_record(file: pathlib.Path) -> bool:
    """Returns whether a file is a study's record in its folder; a saved report lists its rows instead."""
    return file.is_file() and isinstance((read_json(file) or {}).get("rows"), dict)


def _described(folder: pathlib.Path) -> tuple[str, dict[str, Any], pathlib.Path]:
    found = {file.stem: read_json(file) or {} for file in sorted(folder.glob("*.json")) if is_record(file)}
    if not found:
        raise UserError(f"{folder}: no study here; name a study file, or the folder of a study")
    if len(found) > 1:
        files = ", ".join(values["file"] for values in found.values())
        raise UserError(f"{folder} holds several studies: name one of {files}, with --dir={folder}")
    return *next(iter(found.items())), folder


def _saved(file: pathlib.Path) -> dict[str, Any]:
    values = read_json(file)
    if values is None:
        raise UserError(f"{file}: no such file")
    try:
        names = [row["row"] for row in values["rows"]]
        for row in values["rows"]:
            row["missing"], row["failed"]
            {run["seed"]: float(run["top1_error"]) for run in row["runs"]}
            if row["baseline"] is not None and row["baseline"] not in names:
                raise ValueError(f"there is no row {row['baseline']}, the baseline of {row['row']}")
        values["seeds"], values["study"]
        # What a report can do without.
        values = {"about": "", "timed_on": None} | values
        values["rows"] = [
            {"params": None, "gflops": None, "step_ms": None, "overrides": []} | row for row in values["rows"]
        ]
        for row in values["rows"]:
            row["runs"] = [{"device": None, "workdir": "", "command": ""} | run for run in row["runs"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{file} is not a saved report: {what}") from None
    return values


def _command(
    described: dict[str, Any], overrides: list[str], seed: int, workdir: pathlib.Path, result: dict[str, Any]
) -> str:
    gpu, imports = "NVIDIA" in str(result.get("device")), described.get("imports", [])
    threads, devices = result.get("threads"), result.get("devices")
    return command(described["config"], overrides, seed, workdir, threads, devices, gpu=gpu, imports=imports)


def _step_ms(timed: dict[str, Any], folder: pathlib.Path, row: str) -> float | None:
    """Returns the time of a row's step; None if it was not timed, or timed before the row was made anew."""
    of_another = "networks" in timed and timed["networks"].get(row) != fingerprint(folder / row)
    return None if of_another else timed.get("step_ms", {}).get(row)


def _gather(name: str, described: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    timed = read_json(folder / STEP_TIMES.format(study=name)) or {}
    rows = []
    for row, facts in described["rows"].items():
        workdirs = {seed: folder / row / f"seed_{seed}" for seed in described["seeds"]}
        results = {seed: read_json(workdir / "result.json") for seed, workdir in workdirs.items()}
        failures = {seed: read_json(workdir / "failure.json") for seed, workdir in workdirs.items()}
        runs = [
            {key: result.get(key) for key in RUN_KEYS}
            | {"seed": seed, "workdir": str(workdirs[seed]), "data": _data(workdirs[seed])}
            | {"command": _command(described, facts["overrides"], seed, workdirs[seed], result)}
            for seed, result in results.items()
            if result is not None
        ]
        failed = [{"seed": seed, "error": f["error"]} for seed, f in failures.items() if f and not results[seed]]
        over = {run["seed"] for run in runs} | {failure["seed"] for failure in failed}
        rows.append(
            {
                "row": row,
                **facts,
                "runs": runs,
                "failed": failed,
                "missing": [seed for seed in workdirs if seed not in over],
                **_size(folder / row, workdirs.values(), described.get("imports", [])),
                "step_ms": _step_ms(timed, folder, row),
            }
        )
    kept = {key: described[key] for key in ("file", "config", "about", "seeds")}
    return {
        "study": name,
        **kept,
        "directory": str(folder),
        "timed_on": made_on(timed) if "devices" in timed else None,  # older versions did not say how many
        "rows": rows,
    }


def _data(workdir: pathlib.Path) -> str | None:
    """Returns a line that tells the data set of a run from others, also from another content under its name."""
    try:
        info = read_dataset(workdir)
    except UserError:
        return None
    facts = json.dumps([info.class_names, info.channels, info.num_examples, info.digests], sort_keys=True)
    sizes = ", ".join(f"{size:,} in {split}" for split, size in info.num_examples.items())
    return f"{info.name}: {info.num_classes:,} classes, {sizes} (checksum {zlib.crc32(facts.encode()):08x})"


def _size(folder: pathlib.Path, workdirs: Any, imports: Sequence[str]) -> dict[str, Any]:
    """Returns parameters and GFLOPs of a row's network; None, and why, if its data or attention is not known here."""
    from hga_flax.counting.complexity import complexity

    if not (folder / "row.json").exists():  # no run has begun
        return {"params": None, "gflops": None}
    try:
        config = complete(from_json((folder / "row.json").read_text()))
        begun = next((workdir for workdir in workdirs if (workdir / "dataset.json").exists()), None)
        info: DatasetInfo = read_dataset(begun) if begun else dataset_info(config.data.name, config.data.dir)
        size = config.data.image_size
        counted = complexity(build_model(config, info.num_classes), (size, size, info.channels))
    except (OSError, ValueError, UserError) as error:  # ValueError: an attention whose operations cannot be counted
        missing = [f"--import={module}" for module in imports if module not in imported_modules()]
        why = f"{one_line(error)}" + (f"; try {' '.join(missing)}" if missing else "")
        return {"params": None, "gflops": None, "uncounted": why}
    return {"params": counted.params, "gflops": counted.gflops}


def _verdict(compared: comparison.Comparison | None, p: float | None, baseline: bool) -> str:
    if compared is not None:
        return comparison.verdict(compared, p)
    return "baseline" if baseline else "not compared"


def analyse(results: dict[str, Any], metric: str = "top1_error", baseline: str | None = None) -> dict[str, Any]:
    """Adds the statistics to a study's results.

    Args:
        results: results from `load`.
        metric: one of `METRICS`.
        baseline: row to compare all others with, instead of the study's baselines.

    Returns:
        The results with `metric`, `confidence`, `interval`, `correction`, and in each row `seeds` (number), `mean`,
        `sd`, `pairs`, `difference`, `low`, `high`, `half_width`, `p`, `p_holm` and `verdict`.

    Raises:
        UserError: there is no such row, or no run has the metric.
    """
    rows = results["rows"]
    names = [row["row"] for row in rows]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline={baseline}: there is no such row{nearest(baseline, names)}; there are: "
                        + ", ".join(names))  # fmt: skip
    finite = lambda row: [run for run in row["runs"] if comparison.is_finite(run.get(metric))]
    values = {row["row"]: {run["seed"]: run[metric] for run in finite(row)} for row in rows}
    if any(row["runs"] for row in rows) and not any(values.values()):
        why = "; with five classes or fewer there is no top-5 error" if metric == "top5_error" else ""
        raise UserError(f"--metric={metric}: no run has it{why}")
    against = {row["row"]: row["baseline"] if baseline is None else baseline for row in rows}
    against = {name: other if other != name else None for name, other in against.items()}
    compared = {name: comparison.compare(values[name], values[other]) for name, other in against.items() if other}
    corrected = dict(zip(compared, comparison.holm([c.p for c in compared.values()]), strict=True))
    told = []
    for row in rows:
        name, c = row["row"], compared.get(row["row"])
        numbers = list(values[name].values())
        row = {key: value for key, value in row.items() if key != "baseline"}
        told.append(
            row
            | {"seeds": len(numbers), "mean": comparison.mean(numbers), "sd": comparison.deviation(numbers)}
            | {"baseline": against[name]}
            | {key: getattr(c, key, None) for key in ("pairs", "difference", "low", "high", "half_width", "p")}
            | {"p_holm": corrected.get(name), "verdict": _verdict(c, corrected.get(name), name in against.values())}
        )
    counted = sum(p is not None for p in corrected.values())
    more = {
        "metric": metric,
        "confidence": comparison.CONFIDENCE,
        "interval": "paired t, by seed, of each difference alone",
        "correction": f"Holm, over {counted} comparison{'' if counted == 1 else 's'}",
    }
    return {key: value for key, value in results.items() if key != "rows"} | more | {"rows": told}
