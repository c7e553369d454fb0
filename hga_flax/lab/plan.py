"""Prints the plan of a study: its rows, the finished runs, and how long the others will take."""

import statistics
from collections.abc import Sequence

from hga_flax.bench.dry_run import run_seconds, step_flops, step_seconds
from hga_flax.data.sources import dataset_info
from hga_flax.errors import UserError
from hga_flax.lab.hardware import count
from hga_flax.lab.runs import Run, all_runs
from hga_flax.lab.study import Row, Study
from hga_flax.processes.settings import configure_process
from hga_flax.runs.console import Console, duration
from hga_flax.training.experiment import Experiment, create_experiment, prepare
from hga_flax.training.initial_weights import fit_weights
from hga_flax.training.step import make_train_step


def check_rows(study: Study) -> None:
    """Builds each row as training does before the first step: data, schedule and the traced network.

    Rows with a finished run are not checked again.

    Raises:
        UserError: a data set is not prepared, a row cannot be trained, or its initial weights do not fit; the
            message names the row.
    """
    proven = {run.row for run in all_runs(study) if run.result()}
    for row in study.rows.values():
        if row in proven:
            continue
        try:
            prepared = prepare(_experiment(row))
            if row.config.init.weights:
                fit_weights(row.config, prepared.state)
        except UserError as error:
            raise UserError(f"{study.file}: row '{row.name}': {error}") from None


def _experiment(row: Row) -> Experiment:
    configure_process(row.config)
    return create_experiment(row.config, lambda: dataset_info(row.config.data.name, row.config.data.dir))


def print_plan(study: Study, workers: int, minutes: float, *, retry: bool, estimate: bool) -> None:
    """Prints the study and the number of remaining runs.

    Args:
        study: the study.
        workers: number of workers on this machine.
        minutes: time budget of a worker; 0 for none.
        retry: whether failed runs will be repeated.
        estimate: whether to print the rows too, and how long they will take.
    """
    console, runs = Console(), all_runs(study)
    made = {row: [run for run in runs if run.row is row and run.result()] for row in study.rows.values()}
    unmade = {row: [run for run in runs if run.row is row and not run.result()] for row in study.rows.values()}
    failed = {row: [run for run in unmade[row] if run.failure()] for row in study.rows.values()}
    over = {row: len(made[row]) + (0 if retry else len(failed[row])) for row in study.rows.values()}
    left = {row: len(study.seeds) - over[row] for row in study.rows.values()}
    seeds = ", ".join(map(str, study.seeds))
    # Without those that flags leave without effect.
    common = [o for o in study.overrides if any(o in row.overrides for row in study.rows.values())]
    console.table(
        f"study {study.name}",
        [
            *([("asks", study.about)] if study.about else []),
            ("recipe", " ".join([study.config, *_short(common)])),
            ("folder", str(study.directory)),
            ("seeds", seeds),
            ("each run", _hardware(study)),
            ("runs", f"{len(runs)}: {sum(map(len, made.values()))} done, {sum(left.values())} to do"
                     + (f", {n} failed" + ("" if retry else " (--retry repeats them)")
                        if (n := sum(map(len, failed.values()))) else "")),
        ],
    )  # fmt: skip
    if not estimate:
        return
    times = {row: row_seconds(row, made[row]) for row in study.rows.values()}
    console.columns(
        "rows",
        ("row", "compared with", "done", "to do", "one run", "from", "overrides"),
        [
            (row.name, row.baseline or "-", f"{len(made[row])}", f"{left[row]}", duration(times[row][0]), times[row][1],
             " ".join(_short(row.own)))
            for row in study.rows.values()
        ],
    )  # fmt: skip
    whole = sum(times[row][0] * left[row] for row in study.rows.values())
    budget = f"; each starts none that would end after {minutes:g} minutes" if minutes else ""
    shared = f", {duration(whole / workers)} for {workers}" if workers > 1 else ""
    console.line(
        f"to do: about {duration(whole)} for one worker{shared} (estimate; if based on operations, without start "
        f"and compilation){budget}"
    )


def _hardware(study: Study) -> str:
    if not study.threads:
        return "the devices of this process"
    devices = count(study.devices, "device") if study.devices else "all devices"
    return f"{devices}; on CPUs {count(study.threads, 'XLA thread')}"


def _short(overrides: Sequence[str]) -> list[str]:
    return [override.removeprefix("--config.") for override in overrides]


def row_seconds(row: Row, made: list[Run]) -> tuple[float, str]:
    """Returns how many seconds a run of a row takes on one worker, and the source of this figure."""
    seconds = [result["seconds"] for run in made if (result := run.result()) and result.get("sessions", 1) == 1]
    if seconds:
        return statistics.mean(seconds), count(len(seconds), "run")
    return counted_seconds(row), "operations"


def counted_seconds(row: Row) -> float:
    """Estimates the duration of a run from XLA's operation count and the speed of a convolution on this machine."""
    experiment = _experiment(row)
    prepared = prepare(experiment)
    optimizer = experiment.optimizer(prepared.schedule)
    step = make_train_step(experiment.model, optimizer, row.config, experiment.mesh)
    flops = step_flops(experiment, step.lower(prepared.state, experiment.abstract_batch))
    return run_seconds(experiment, prepared.plan, step_seconds(experiment, flops))
