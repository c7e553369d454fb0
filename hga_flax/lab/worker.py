"""One worker of a study: claims a run that is missing, makes it, writes down what came out, until none is left.

Runs are made in this process, one after another: a killed worker leaves nothing running behind it, and what is
imported and compiled is imported and compiled once.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from hga_flax.errors import Interrupted, UserError, one_line
from hga_flax.lab.hardware import Hardware, count, hold
from hga_flax.lab.runs import Run, all_runs, last_evaluation, open_directory, write_text
from hga_flax.lab.study import Study
from hga_flax.processes.preemption import handled_signals, survive_hangup
from hga_flax.processes.settings import configure_process
from hga_flax.runs.console import duration
from hga_flax.storage.locks import Claim, Claims
from hga_flax.version import __version__

POLL_SECONDS = 2.0


def work(study: Study, say: Callable[[str], None], budget_minutes: float = 0.0, parent: int | None = None) -> int:
    """Makes runs until all are over, or the budget is spent; waits for those of other workers.

    Args:
        study: all its rows are valid.
        say: called with each line to show.
        budget_minutes: no run is begun that is expected to end later; 0 is no end.
        parent: the process that started this worker, which does not outlive it.

    Returns:
        How many of the study's runs failed.

    Raises:
        UserError: the study's folder cannot be used, or its runs were made on other hardware.
        Interrupted: a signal ended the worker in good order; the run in flight goes on from its last step.
    """
    began = time.monotonic()
    claims = Claims(open_directory(study))
    configure_process(next(iter(study.rows.values())).config)  # before a device is touched
    hardware = hold(study)
    study = dataclasses.replace(study, threads=hardware.threads or 0)
    runs = all_runs(study)
    with _Stop() as stop:
        while pending := [run for run in runs if not run.is_over]:
            stop.check()
            if parent is not None and os.getppid() != parent:
                raise Interrupted("the command that started this worker is gone; the same command goes on", 143)
            in_time = pending
            if budget_minutes:
                left, expected = 60 * budget_minutes - (time.monotonic() - began), expected_seconds(runs)
                in_time = [run for run in pending if expected(run) < left]
            if not in_time:
                say(f"the budget of {budget_minutes:g} minutes leaves {len(pending)} runs for later")
                break
            taken = next(((run, claim) for run in in_time if (claim := claims.take(run.name))), None)
            if taken is None:
                time.sleep(POLL_SECONDS)
                continue
            run, claim = taken
            try:
                if not run.is_over:  # another worker has ended it since
                    stop.signal = _make(run, claim, claims, runs, say, parent, hardware) or stop.signal
            finally:
                claims.release(claim)
    return sum(run.failure() is not None for run in runs)


class _Stop:
    """A context: between two runs a signal ends the worker by an exception; during a run training has them."""

    def __enter__(self) -> "_Stop":
        self.signal = 0
        self._handlers = {signum: signal.signal(signum, self._handle) for signum in handled_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            survive_hangup()
        self.signal = signum
        self.check()

    def check(self) -> None:
        """Raises Interrupted if a signal came, also one whose exception was lost in a callback of a library."""
        if self.signal:
            name = signal.Signals(self.signal).name
            raise Interrupted(f"stopped by {name}; the same command goes on", 128 + self.signal)


def expected_seconds(runs: list[Run]) -> Callable[[Run], float]:
    """Returns a function that tells how long runs of the same row took, else those of any row, else 0."""
    made: dict[str, list[float]] = {}
    for run in runs:
        if result := run.result():
            made.setdefault(run.row.name, []).append(result["seconds"])
    every = [seconds for row in made.values() for seconds in row]
    return lambda run: statistics.mean(made.get(run.row.name) or every or [0.0])


def _make(
    run: Run,
    claim: Claim,
    claims: Claims,
    runs: list[Run],
    say: Callable[[str], None],
    parent: int | None,
    hardware: Hardware,
) -> int:
    """Trains, and writes result.json or failure.json; returns the signal that came after the last step, or 0."""
    title, begun = f"{run.row.name} seed {run.seed}", run.workdir.exists()
    say(f"{title:<28} {'goes on' if begun else 'begins'}")
    write_text(run.workdir / "command.txt", run.command + "\n")
    start = time.monotonic()
    try:
        with claims.beating(claim, lambda: _check(claim, parent)):
            signum = _train(run)
            end = last_evaluation(run.workdir) | _facts(hardware, claim, time.monotonic() - start)
            if claim.is_lost:
                _leave()
            write_text(run.workdir / "result.json", json.dumps(end, indent=2) + "\n")
    except Interrupted:
        raise
    except Exception as error:  # also what is no user's mistake, as a device out of memory: the other rows go on
        if not isinstance(error, UserError):
            with (run.workdir / "log.txt").open("a") as log:
                traceback.print_exc(file=log)
            error = f"{type(error).__name__}: {one_line(error)[:300]}; see {run.workdir / 'log.txt'}"
        write_text(run.workdir / "failure.json", json.dumps({"error": one_line(error), "command": run.command}) + "\n")
        say(f"{title:<28} failed: {one_line(error)}")
        return 0
    over = sum(other.is_over for other in runs)
    took = duration(end["seconds"])
    say(f"{title:<28} top-1 error {end['top1_error']:6.2f} %  {took:>8}  {over} of {len(runs)} runs")
    return signum


def _train(run: Run) -> int:
    import jax

    from hga_flax.training.trainer import train

    try:
        with (run.workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            return train(run.config, str(run.workdir))
    finally:
        jax.clear_caches()  # the next run is another network; a long study would keep them all


def _facts(hardware: Hardware, claim: Claim, seconds: float) -> dict[str, Any]:
    """What is known of a run beside its evaluation; `seconds` are of its last session."""
    import jax

    device = jax.devices()[0]
    return {
        "seconds": seconds,
        "sessions": claim.number + 1,
        "machine": platform.node(),
        "device": device.device_kind if hardware.threads is None else count(hardware.threads, "CPU thread"),
        "devices": hardware.devices,
        "threads": hardware.threads,
        "jax": jax.__version__,
        "hga_flax": __version__,
    }


def _check(claim: Claim, parent: int | None) -> None:
    """Runs in the heartbeat's thread: a worker whose run is another's by now must not write to it any more."""
    if claim.is_lost:
        _leave()
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _leave() -> None:
    print("error: this worker was silent for so long that another took its run over", file=sys.stderr, flush=True)
    os._exit(1)


def clear_failures(study: Study) -> None:
    """Forgets the failures, so that these runs are made again."""
    for run in all_runs(study):
        with contextlib.suppress(FileNotFoundError):
            pathlib.Path(run.workdir / "failure.json").unlink()
