"""`python -m hga_flax runs DIR...`: lists the runs found in folders, also those of older versions, in one table.

    runs DIR... [--sort=folder|error|written] [--json]

Reads only the small files of each workdir, about a second for fifty runs: config.json, metrics.jsonl,
newest_checkpoint.json, dataset.json and the JSON that a checkpoint stores beside its arrays.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hga_flax.errors import UserError, called, expand, one_line

FILES = ("config.json", "metrics.jsonl", "newest_checkpoint.json")  # a folder with one of these is a run
OWN = {"checkpoints", "damaged", "superseded", "tensorboard"}  # subfolders of a run, which are not searched for runs
GROUPS = ("model", "data", "training")  # a config.json without any of these groups is another program's


@dataclasses.dataclass(frozen=True)
class Row:
    """One run in the listing.

    Attributes:
        workdir: the run's folder, as found from the folder on the command line.
        network: network name.
        network_options: non-default options of the network.
        attention: attention name.
        attention_options: non-default options of the attention.
        data: name of the data set.
        data_dir: folder of the data set, if one was given.
        fake: whether the run trains on synthetic images.
        steps: last step logged or saved.
        planned_steps: steps of the whole run; None if the size of the training split is unknown.
        saved_step: step of the newest checkpoint; None without a checkpoint.
        best_error: lowest top-1 error of an evaluation, in percent; None before the first evaluation.
        best_step: step of that evaluation.
        written: time of the last write to a file of the run, in seconds since 1970.
        state: "complete", "running" (a process is training there now) or "unfinished".
    """

    workdir: str
    network: str
    network_options: str
    attention: str
    attention_options: str
    data: str
    data_dir: str
    fake: bool
    steps: int
    planned_steps: int | None
    saved_step: int | None
    best_error: float | None
    best_step: int | None
    written: float
    state: str

    def as_json(self) -> dict[str, Any]:
        """Returns the fields for JSON, with the time as ISO 8601 in UTC, plus `complete`."""
        written = datetime.datetime.fromtimestamp(self.written, datetime.UTC).isoformat(timespec="seconds")
        return dataclasses.asdict(self) | {"written": written, "complete": self.state == "complete"}


SORTS: dict[str, Callable[[Row], Any]] = {
    "folder": lambda row: _natural(row.workdir),  # also breaks ties in the other orders
    "error": lambda row: math.inf if row.best_error is None else row.best_error,
    "written": lambda row: -row.written,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="local folders to search, with all their subfolders")
    parser.add_argument(
        "--sort",
        choices=SORTS,
        default="folder",
        help="sort by name, by lowest error or by most recently written (default: folder)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects as JSON instead of the table")


def run(arguments: argparse.Namespace) -> None:
    """Prints a row for each run, and a line on standard error for each damaged folder.

    Raises:
        UserError: no run was found, or a given folder cannot be searched (after listing the others).
    """
    rows, bad = [], 0
    say = lambda text: print(f"warning: {one_line(called(text))}", file=sys.stderr, flush=True)
    seen: set[tuple[int, int]] = set()
    for directory in arguments.dirs:
        try:
            root = _root(directory)
        except UserError as error:
            say(error)
            bad += 1
            continue
        for workdir in find_runs(root, say, seen):
            try:
                rows.append(read_row(workdir, say))
            except UserError as error:
                say(error)
    rows.sort(key=SORTS["folder"])
    rows.sort(key=SORTS[arguments.sort])
    if arguments.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
    elif rows:
        print("\n".join(lines(rows)))
    if bad:
        raise UserError(f"could not search {bad:,} of {len(arguments.dirs):,} folders; see the lines above")
    if not rows:
        raise UserError(f"no run that can be listed in {', '.join(arguments.dirs)}")


def _root(directory: str) -> pathlib.Path:
    if "://" in directory:
        raise UserError(
            f"{directory}: runs in buckets are not listed, only those in folders of this machine; `python -m hga_flax "
            "plot` and `evaluate.py` read a single one there"
        )
    root = expand(directory, "DIR")
    if not root.is_dir():
        raise UserError(f"{directory}: {'it is a file, not a folder' if root.exists() else 'no such folder'}")
    return root


def find_runs(
    root: pathlib.Path, say: Callable[[str], None], seen: set[tuple[int, int]] | None = None
) -> Iterator[pathlib.Path]:
    """Yields the run folders at or below a folder; hidden folders are skipped.

    Symbolic links are followed last, so that a run reachable in two ways is listed once, under its real path.

    Args:
        root: the folder to search.
        say: called with one line for each folder that cannot be read.
        seen: folders (device, inode) already searched; updated in place.
    """
    seen = set() if seen is None else seen
    here, links = [root], []
    while here or links:
        folder = here.pop() if here else links.pop()
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            say(f"{folder} cannot be searched: {error.strerror or error}")
            continue
        is_run = _is_run(folder, {entry.name for entry in entries if not _is_folder(entry)})
        if is_run:
            yield folder
        for entry in reversed(entries):
            if _is_folder(entry) and not entry.name.startswith(".") and not (is_run and entry.name in OWN):
                (links if entry.is_symlink() else here).append(folder / entry.name)


def _is_run(folder: pathlib.Path, names: set[str]) -> bool:
    found = names.intersection(FILES)
    if found == {"config.json"}:  # other programs use this file name too
        with contextlib.suppress(OSError, ValueError, RecursionError):
            config = json.loads((folder / "config.json").read_text())
            return not isinstance(config, dict) or not config or any(group in config for group in GROUPS)
    return bool(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a circular link
        return entry.is_dir()
    return False


def read_row(workdir: pathlib.Path, say: Callable[[str], None]) -> Row:
    """Reads a workdir written by this or an older version.

    Args:
        workdir: the folder of the run.
        say: called with one line for each damaged file that does not prevent listing the run.

    Raises:
        UserError: the configuration cannot be read.
    """
    from hga_flax.runs.progress import planned_steps
    from hga_flax.runs.ranking import rank
    from hga_flax.runs.workdir import read_config, read_dataset

    if not (workdir / "config.json").exists():
        there = next((f"a {name}" for name in FILES if (workdir / name).exists()), "only links to files that are gone")
        raise UserError(f"{workdir} is damaged: it has {there}, but no config.json")
    config = read_config(workdir)
    _check_ours(workdir, config)
    evaluations, logged = _logged(workdir, say)
    saved, lost = _saved_step(workdir)
    if lost is not None:
        say(f"{workdir} is damaged: its checkpoint of step {lost}, which was complete, is gone")
    progress = _progress(workdir, saved, say) if saved is not None else {}
    if best := progress.get("best"):
        evaluations.append({"top1_error": best["top1_error"], "loss": best["loss"], "step": best["step"]})
    best = min(evaluations, key=lambda values: (*rank(values), values["step"]), default=None)
    if best is not None and not math.isfinite(rank(best)[0]):
        best = None
    size = progress.get("num_examples")
    if not size and (workdir / "dataset.json").exists():
        try:
            size = read_dataset(workdir).num_examples.get(config.data.train_split)
        except UserError as error:
            say(error)
    planned = planned_steps(config, size or 0) if size or config.training.steps else None
    is_over = saved is not None and planned is not None and saved >= planned and not progress.get("evaluation_due")
    return Row(
        workdir=str(workdir),
        network=config.model.name,
        network_options=config.model.options,
        attention=config.model.attention,
        attention_options=config.model.attention_options,
        data=config.data.name,
        data_dir=config.data.dir,
        fake=config.data.fake,
        steps=max(logged, saved or 0, lost or 0),
        planned_steps=planned,
        saved_step=saved,
        best_error=best and best["top1_error"],
        best_step=best and best["step"],
        written=_written(workdir),
        state="running" if _is_running(workdir) else "complete" if is_over else "unfinished",
    )


def _check_ours(workdir: pathlib.Path, config: Any) -> None:
    """Raises a UserError if a configuration key shown in the listing is missing or has the wrong type."""
    kinds = {
        "model": {"name": str, "options": str, "attention": str, "attention_options": str},
        "data": {"name": str, "dir": str, "fake": bool, "train_split": str},
        "training": {"steps": int, "epochs": (int, float), "batch_size": int},
    }
    for group, keys in kinds.items():
        for key, kind in keys.items():
            try:
                value = config[group][key]
            except (KeyError, TypeError, AttributeError):
                raise UserError(f"{workdir} is damaged: its config.json has no {group}.{key}") from None
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise UserError(f"{workdir} is damaged: in its config.json {group}.{key} is {value!r}")
    if config.training.batch_size < 1 or not math.isfinite(config.training.epochs):
        raise UserError(f"{workdir} is damaged: its config.json has an impossible batch_size or epochs")


def _logged(workdir: pathlib.Path, say: Callable[[str], None]) -> tuple[list[dict[str, Any]], int]:
    """Returns the evaluations in metrics.jsonl and the last logged step, which is 0 if nothing is logged."""
    from hga_flax.pictures.curves import Curve, read_curves

    file = workdir / "metrics.jsonl"
    try:
        if not file.exists() or not file.stat().st_size:  # nothing logged yet
            return [], 0
        curves, damaged = read_curves(file)
    except (UserError, OSError) as error:
        say(error)
        return [], 0
    if damaged:
        say(f"{file}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    errors, losses = (curves.get(f"eval/{name}", Curve([], [])) for name in ("top1_error", "loss"))
    loss = dict(zip(losses.steps, losses.values, strict=True))
    evaluations = [
        {"step": step, "top1_error": error, "loss": loss.get(step)}
        for step, error in zip(errors.steps, errors.values, strict=True)
    ]
    return evaluations, max(curve.steps[-1] for curve in curves.values())


def _saved_step(workdir: pathlib.Path) -> tuple[int | None, int | None]:
    """Returns (newest step with a checkpoint, None), or (None, recorded step) if all checkpoints are gone."""
    steps = []
    for folder in ("checkpoints", "superseded"):
        with contextlib.suppress(OSError):
            steps += [int(name) for name in os.listdir(workdir / folder) if re.fullmatch("0|[1-9][0-9]*", name)]
    if steps:
        return max(steps), None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return None, int(json.loads((workdir / "newest_checkpoint.json").read_text())["step"])
    return None, None


def _progress(workdir: pathlib.Path, step: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the values that the listing needs from the JSON beside a checkpoint's arrays."""
    folders = [workdir / name / str(step) for name in ("checkpoints", "superseded")]
    folder = next((folder for folder in folders if folder.exists()), folders[0])
    try:
        kept = json.loads((folder / "run" / "metadata").read_text())["run"]
        best = kept["best"]
        if best and best["top1_error"] is None:  # older versions recorded evaluations of zero images
            best = None
        if best:
            best = {"step": int(best["step"]), "top1_error": float(best["top1_error"]), "loss": best["loss"]}
        return {
            "best": best,
            "num_examples": int(kept["num_examples"]),
            "evaluation_due": bool(kept.get("evaluation_due")),
        }
    except OSError as error:
        reason = error.strerror or one_line(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        reason = "its content is not that of a run"
    say(f"{folder} is damaged: run/metadata: {reason}")
    return {}


def _written(workdir: pathlib.Path) -> float:
    times = []
    for name in (*FILES, "checkpoints"):
        with contextlib.suppress(OSError):
            times.append((workdir / name).stat().st_mtime)
    return max(times)


def _is_running(workdir: pathlib.Path) -> bool:
    """Returns whether a `train.py` holds the workdir; on another machine, only if its heartbeat is recent.

    The file server's clock may be ahead or behind, but not by more than STALE_SECONDS.
    """
    from hga_flax.runs.manifest import CLAIM
    from hga_flax.storage.locks import STALE_SECONDS, Claims

    claims = Claims(workdir)
    if not claims.is_held(CLAIM):
        return False
    return not claims.is_elsewhere(CLAIM) or abs(time.time() - claims.mark(CLAIM)[0] / 1e9) < STALE_SECONDS


def lines(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of the printed table: a header and a line for each run."""
    head = ("workdir", "network", "attention", "data", "steps", "best error", "last written", "state")
    cells = [head, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {4, 5}
    return [
        "  ".join(
            f"{cell:>{w}}" if i in right else f"{cell:<{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    options = lambda name, text: f"{name}({text})" if text else name
    data = f"{row.data} {pathlib.Path(row.data_dir).name}" if row.data == "folder" and row.data_dir else row.data
    planned = "?" if row.planned_steps is None else f"{row.planned_steps:,}"
    cells = (
        row.workdir,
        options(row.network, row.network_options),
        options(row.attention, row.attention_options),
        f"{data} (synthetic)" if row.fake else data,
        f"{row.steps:,} of {planned}",
        "-" if row.best_error is None else f"{row.best_error:.2f} %",
        datetime.datetime.fromtimestamp(row.written).strftime("%Y-%m-%d %H:%M"),
        row.state,
    )
    # Undecodable names and line breaks must not break the table.
    return tuple(one_line(cell.encode(errors="surrogateescape").decode(errors="replace")) for cell in cells)


def _natural(text: str) -> list[Any]:
    """Returns a sort key that orders seed_2 before seed_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split("([0-9]+)", text)]
