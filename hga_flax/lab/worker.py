"""One worker of a study: claims a missing run, trains it and records the result, until none is left.

All its runs share one process, one after another: a killed worker leaves no processes behind, and imports and
compilations happen only once.
"""

import contextlib
import dataclasses
import gc
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from hga_flax.config.command_line import code_in_use
from hga_flax.errors import Interrupted, UserError, may_pass, one_line
from hga_flax.lab.hardware import Hardware, facts, hold
from hga_flax.lab.runs import Run, all_runs, last_evaluation, open_directory, write_text
from hga_flax.lab.study import Study
from hga_flax.processes.preemption import handled_signals, survive_hangup
from hga_flax.processes.settings import configure_process
from hga_flax.runs.console import duration
from hga_flax.storage.locks import Claim, Claims, surely_lost

POLL_SECONDS = 2.0


def work(study: Study, say: Callable[[str], None], budget_minutes: float = 0.0, parent: int | None = None) -> int:
    """Trains runs until all are finished or the budget is used up; waits for the runs of other workers.

    Args:
        study: a study whose rows are valid.
        say: called with each line to show.
        budget_minutes: start no run that is expected to end later than this; 0 means no limit.
        parent: process that started this worker; the worker stops when it is gone.

    Returns:
        The number of failed runs of the study, and of those that this worker put off.

    Raises:
        UserError: the study's folder cannot be used, or its runs have other hardware.
        Interrupted: a signal stopped the worker cleanly; its current run will resume from its last step.
    """
    began = time.monotonic()
    claims = Claims(open_directory(study))
    configure_process(next(iter(study.rows.values())).config)  # before JAX initialises its devices
    hardware = hold(study)
    study = dataclasses.replace(study, threads=hardware.threads or 0, devices=hardware.devices)
    runs = all_runs(study)
    put_off: set[str] = set()  # runs with something in their way; tried again at the end if others were made meanwhile
    made = False
    with _Stop() as stop:
        while True:
            pending = [run for run in _pending(runs) if run.name not in put_off]
            if not pending and made:
                put_off, made = set(), False
                pending = _pending(runs)
            if not pending:
                break
            stop.check()
            if parent is not None and os.getppid() != parent:
                raise Interrupted("the command that started this worker is gone; the same command resumes", 143)
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
                if _pending([run]):  # another worker may have just finished it
                    stop.signal = _make(run, claim, claims, runs, say, parent, hardware) or stop.signal
                    if run.result():
                        made = True
                    elif not run.failure():
                        put_off.add(run.name)
            finally:
                claims.release(claim)
    put_off &= {run.name for run in _pending(runs)}
    if put_off:
        say(f"put off, until the same command tries again: {', '.join(sorted(put_off))}")
    return sum(run.failure() is not None and not run.result() for run in runs) + len(put_off)


def _pending(runs: list[Run]) -> list[Run]:
    """Returns the runs that are not over; waits while the file server does not say."""
    while True:
        try:
            return [run for run in runs if not run.is_over]
        except OSError:
            time.sleep(POLL_SECONDS)


class _Stop:
    """Context manager: a signal between runs raises Interrupted; during a run, training handles signals."""

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
        """Raises Interrupted after a signal, even if a library's callback swallowed the handler's exception."""
        if self.signal:
            name = signal.Signals(self.signal).name
            raise Interrupted(f"stopped by {name}; the same command resumes", 128 + self.signal)


def expected_seconds(runs: list[Run]) -> Callable[[Run], float]:
    """Returns a function that estimates a run's seconds: the mean of its row, else of all rows, else 0.

    A resumed run's result has the seconds of its last session only, so it is left out, unless there are no others.
    """
    made: dict[str, list[float]] = {}
    parts = [0.0]
    for run in runs:
        if result := run.result():
            whole = result.get("sessions", 1) == 1
            (made.setdefault(run.row.name, []) if whole else parts).append(result["seconds"])
    every = [seconds for row in made.values() for seconds in row]
    return lambda run: statistics.mean(made.get(run.row.name) or every or [max(parts)])


def _make(
    run: Run,
    claim: Claim,
    claims: Claims,
    runs: list[Run],
    say: Callable[[str], None],
    parent: int | None,
    hardware: Hardware,
) -> int:
    """Trains and writes result.json or failure.json; returns a signal received after the last step, or 0.

    It writes neither if something outside the run is in its way and may pass, such as another command in its folder.
    """
    title, begun = f"{run.row.name} seed {run.seed}", run.workdir.exists()
    say(f"{title:<28} {'resumes' if begun else 'starts'}")
    write_text(run.workdir / "command.txt", run.command + "\n")
    start = time.monotonic()
    try:
        with claims.beating(claim, lambda: _check(claim, parent)):
            signum = _train(run)
            end = last_evaluation(run.workdir) | _facts(hardware, claim, time.monotonic() - start)
            if surely_lost(claim):
                _leave()
            write_text(run.workdir / "result.json", json.dumps(end, indent=2) + "\n")
    except Exception as error:  # any error, such as running out of memory: the other rows continue
        if surely_lost(claim):
            _leave()
        if may_pass(error):
            say(f"{title:<28} put off: {one_line(error)}")
            return 0
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

    words = shlex.split(run.command)
    arguments, sys.argv = sys.argv, words[words.index("train.py") :]  # the command that an error asks to repeat
    try:
        with (run.workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            return train(run.config, str(run.workdir))
    finally:
        sys.argv = arguments
        jax.clear_caches()  # otherwise a long study would keep the programs and images of all its runs
        gc.collect()


def _facts(hardware: Hardware, claim: Claim, seconds: float) -> dict[str, Any]:
    """Returns facts about a run besides its evaluation; `seconds` is the time of its last session."""
    import jax

    return {
        "seconds": seconds,
        "sessions": claim.number + 1,
        "machine": platform.node(),
        **facts(hardware),
        "jax": jax.__version__,
        "hga_flax": code_in_use(),
    }


def _check(claim: Claim, parent: int | None) -> None:
    """Runs in the heartbeat thread: exits if another worker took the run over, because two must not write."""
    if surely_lost(claim):
        _leave()
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _leave() -> None:
    print("error: this worker was silent for so long that another took its run over", file=sys.stderr, flush=True)
    os._exit(1)


def clear_failures(study: Study) -> None:
    """Deletes the recorded failures, so that these runs are repeated."""
    for run in all_runs(study):
        (run.workdir / "failure.json").unlink(missing_ok=True)
