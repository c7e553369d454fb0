"""The folder of a study: its runs, which of them are finished, and their results.

DIR/NAME.json               the study, for the report       DIR/claims/             which worker has which run
DIR/ROW/row.json            the row's configuration         DIR/ROW/seed_N/         an ordinary workdir, with
DIR/ROW/seed_N/result.json  the last evaluation             DIR/ROW/seed_N/log.txt  training's output
DIR/ROW/seed_N/failure.json the error of a failed run, instead of result.json
DIR/hardware.json           the hardware of each run, see hardware.py
"""

import dataclasses
import json
import os
import pathlib
import shlex
import uuid
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from hga_flax.config.command_line import imported_modules
from hga_flax.config.loading import to_json
from hga_flax.errors import UserError, one_line
from hga_flax.lab.study import CLAIMS, Row, Study, check_same_rows, with_seed
from hga_flax.storage.locks import exists


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A row of a study with one of its seeds."""

    row: Row
    seed: int
    study: Study

    @property
    def name(self) -> str:
        """Name of the run in the claims folder."""
        return f"{self.row.name}.seed_{self.seed}"

    @property
    def workdir(self) -> pathlib.Path:
        """Workdir of the run."""
        return self.study.directory / self.row.name / f"seed_{self.seed}"

    @property
    def config(self) -> ConfigDict:
        """Configuration of the row with this seed."""
        return with_seed(self.row.config, self.seed)

    @property
    def command(self) -> str:
        """Command that carries out this run on its own."""
        study, gpu = self.study, not self.study.threads and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return command(study.config, self.row.overrides, self.seed, self.workdir, study.threads, study.devices, gpu=gpu)

    def result(self) -> dict[str, Any] | None:
        """Returns the last evaluation with facts about the run, or None if the run is not finished."""
        return read_json(self.workdir / "result.json")

    def failure(self) -> str | None:
        """Returns the error of a failed run, or None."""
        return (read_json(self.workdir / "failure.json") or {}).get("error")

    @property
    def is_over(self) -> bool:
        """Whether the run has a result or a failure."""
        return any(exists(self.workdir / name) for name in ("result.json", "failure.json"))


def command(
    config: str,
    overrides: Sequence[str],
    seed: int,
    workdir: pathlib.Path,
    threads: int | None = None,
    devices: int | None = None,
    *,
    gpu: bool = False,
    imports: Sequence[str] = (),
) -> str:
    """Returns the command of one run, on the same hardware (see hardware.py).

    Args:
        config: configuration file.
        overrides: "--config.key=value" arguments.
        seed: seed of the run.
        workdir: folder of the run.
        threads: XLA's number of threads on CPUs; None or 0 if unknown, or on other devices.
        devices: number of devices; None or 0 if unknown.
        gpu: whether the devices are NVIDIA GPUs.
        imports: modules to import first, besides those that this command was given.
    """
    modules = dict.fromkeys([*imports, *imported_modules()])
    parts = [f"--config={config}", *(f"--import={module}" for module in modules), *overrides]
    parts += [f"--config.seed={seed}", f"--workdir={workdir}"]
    variables = f"JAX_NUM_CPU_DEVICES={devices or 1} NPROC={threads} " if threads else ""
    if gpu and devices:
        variables = f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(devices)))} "
    return variables + "python train.py " + shlex.join(parts)


def read_json(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns the dictionary in a JSON file, or None if the file does not exist.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a dictionary")
        return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None


def write_text(file: pathlib.Path, text: str) -> None:
    """Replaces a file atomically, safe against concurrent writers; creates its folder.

    Raises:
        UserError: the file cannot be written.
    """
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text)
        scratch.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or one_line(error)}") from None


def all_runs(study: Study) -> list[Run]:
    """Returns the runs ordered by seed, so that in an unfinished study all rows have about equally many results."""
    return [Run(row, seed, study) for seed in study.seeds for row in study.rows.values()]


def open_directory(study: Study) -> pathlib.Path:
    """Creates the study's folder, records the study in it, and returns the folder for claims.

    Raises:
        UserError: the folder is not writable, or has rows with the same names but different configurations.
    """
    check_same_rows(study)
    for row in study.rows.values():
        file = study.directory / row.name / "row.json"
        if not file.exists():
            write_text(file, to_json(row.config) + "\n")
    write_text(study.directory / f"{study.name}.json", json.dumps(record(study), indent=2) + "\n")
    return study.directory / CLAIMS


def record(study: Study) -> dict[str, Any]:
    """Returns the study as recorded in its folder."""
    return {
        "file": study.file,
        "config": study.config,
        "about": study.about,
        "seeds": list(study.seeds),
        "imports": imported_modules(),
        "rows": {row.name: {"overrides": list(row.overrides), "baseline": row.baseline} for row in study.rows.values()},
    }


def last_evaluation(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the last logged evaluation of a finished run: `step`, `top1_error`, `top5_error` (in %), `loss`.

    Raises:
        UserError: the run logged no evaluation.
    """
    last: dict[str, Any] | None = None
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "eval/top1_error" in values:
            last = values
    if last is None:
        raise UserError(f"{workdir}: metrics.jsonl holds no evaluation")
    return {"step": last["step"]} | {
        name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")
    }
