"""`python -m hga_flax study FILE`: carries out the missing runs of a study.

The same command may be started any number of times, on any number of machines that share the folder. Through it the
workers divide the runs among themselves, resume interrupted runs and skip finished ones.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

from hga_flax.config.command_line import add_import_flag, import_flags
from hga_flax.errors import Interrupted, UserError, drop_unread_output

if TYPE_CHECKING:
    from hga_flax.lab.study import Study

MOST_WORKERS = 256
HARDWARE = ("threads", "devices")  # flags that have the names of keys in a study file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("file", metavar="FILE", help="study file, for example studies/smoke.py")
    parser.add_argument(
        "--dir", metavar="DIR", help="folder for the runs, shared by all workers (default: set in the study file)"
    )
    add_study_flags(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="worker processes on this machine, which share its cores or GPUs (default: 1)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="XLA threads per run on CPUs; changes the results (default: set in the study file)",
    )
    parser.add_argument("--devices", type=int, metavar="N", help="GPUs per run; changes the results")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="time budget: start no run that is expected to exceed it (default: set in the study file)",
    )
    parser.add_argument("--retry", action="store_true", help="repeat failed runs")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the estimated time, then exit")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # I/N: marks a worker that this command starts


def add_study_flags(parser: argparse.ArgumentParser) -> None:
    """Declares the flags that select a variant of a study file: `--scale`, and any configuration key."""
    add_import_flag(parser)
    parser.add_argument(
        "--scale", metavar="NAME", help="size of the study, one of those in its file (default: the first)"
    )
    parser.epilog = "Every configuration key is a flag too and applies to all rows: --config.data.name=cifar10"
    parser.set_defaults(takes_overrides=True)


def study_flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags that select the same study and folder."""
    named = {"scale": arguments.scale, "dir": arguments.dir}
    return [f"--{name}={value}" for name, value in named.items() if value] + import_flags() + arguments.overrides


def run(arguments: argparse.Namespace) -> int:
    """Carries out the missing runs; returns 1 if a run failed or was put off, unless others made it.

    Raises:
        UserError: the study, one of its rows, its data or its folder cannot be used.
        Interrupted: a signal ended the command; the same command resumes.
    """
    if not 1 <= arguments.workers <= MOST_WORKERS:
        raise UserError(f"--workers={arguments.workers}: must be from 1 to {MOST_WORKERS}")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes={arguments.minutes:g}: must be above 0")
    from hga_flax.lab import hardware, worker
    from hga_flax.lab.study import MOST_PARTS, check_same_rows, load_study

    asked = {name: value for name in HARDWARE if (value := getattr(arguments, name)) is not None}
    for name, value in asked.items():
        if not 1 <= value <= MOST_PARTS:
            raise UserError(f"--{name}={value}: must be from 1 to {MOST_PARTS}")
    study = load_study(
        arguments.file, arguments.dir, check=not arguments.part, scale=arguments.scale, overrides=arguments.overrides
    )
    study = dataclasses.replace(study, **asked)
    study = hardware.settle(study, (lambda line: None) if arguments.part else say)
    index, number = map(int, (arguments.part or "0/1").split("/"))
    hint = more_workers(study, arguments.workers)  # before `arrange` hides the other GPUs
    if arguments.part or arguments.workers == 1 or arguments.dry_run:  # before JAX initialises its devices
        hardware.arrange(study, (index, number))
    minutes = study.budget_minutes if arguments.minutes is None else arguments.minutes
    if arguments.part:
        return int(bool(worker.work(study, say, minutes, parent=os.getppid())))
    import jax

    from hga_flax.lab.plan import check_rows, print_plan
    from hga_flax.lab.runs import all_runs
    from hga_flax.runs.workdir import check_name

    check_same_rows(study)
    check_name(study.directory.absolute())
    if arguments.workers > 1 and not arguments.dry_run:  # leave the devices to the workers
        jax.config.update("jax_platforms", "cpu")
        hardware.use_cpu_devices(study)
    check_rows(study)
    print_plan(study, arguments.workers, minutes, retry=arguments.retry, estimate=arguments.dry_run)
    if hint:
        say(hint)
    if arguments.dry_run:
        return 0
    if arguments.retry:
        worker.clear_failures(study)
    failed = start_workers(arguments) if arguments.workers > 1 else worker.work(study, say, minutes)
    failed = failed and not all(run.result() for run in all_runs(study))  # others finish what a killed worker began
    say(f"for the report: python -m hga_flax report {shlex.join([arguments.file, *study_flags(arguments)])}")
    return int(bool(failed))


def say(line: str) -> None:
    """Prints a line with a single write, so that the lines of several workers do not mix."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads the output any more; continue the runs
        drop_unread_output()
    except (OSError, AttributeError):  # a full disk; no standard output at all
        pass


def more_workers(study: "Study", workers: int) -> str | None:
    """Returns a hint to start more workers if cores or GPUs would be idle, else None."""
    from hga_flax.data.pipeline import available_cores
    from hga_flax.lab.hardware import gpus

    visible = len(gpus())
    fitting = visible // study.devices if visible else available_cores() // study.threads
    what = "GPUs" if visible else "cores"
    return f"--workers={fitting} would use all {what} of this machine" if 1 <= workers < fitting else None


def start_workers(arguments: argparse.Namespace) -> int:
    """Starts the workers, forwards signals to them, and waits for all of them.

    Returns:
        1 if a run failed or a worker ended with an error, else 0.

    Raises:
        Interrupted: a signal ended the workers.
    """
    command = [sys.executable, "-m", "hga_flax", "study", arguments.file, *study_flags(arguments)]
    command += [f"--minutes={arguments.minutes}"] if arguments.minutes else []
    command += [f"--{name}={value}" for name in HARDWARE if (value := getattr(arguments, name))]
    workers: list[subprocess.Popen] = []
    heard: list[int] = []

    told: set[int] = set()  # processes of the workers that got a signal

    def tell(worker: subprocess.Popen, signum: int) -> None:
        told.add(worker.pid)
        worker.send_signal(signum)

    def hand_on(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)
        for worker in workers:
            tell(worker, signum)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # under nohup
    stopping = (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,)))
    before = {signum: signal.signal(signum, hand_on) for signum in stopping}
    try:
        for index in range(arguments.workers):
            if heard:
                break
            # In its own session, so that it receives Ctrl-C only once: forwarded from here.
            part = f"--part={index}/{arguments.workers}"
            workers.append(subprocess.Popen([*command, part], start_new_session=True))
            if heard and workers[-1].pid not in told:  # the signal came before it was in the list
                tell(workers[-1], heard[0])
        running = list(workers)
        while running:
            time.sleep(0.2)
            ended = [worker for worker in running if worker.poll() is not None]
            running = [worker for worker in running if worker not in ended]
            for worker in ended:
                if worker.returncode < 0 and not heard:
                    say(_killed(worker, len(running)))
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if heard:
        raise Interrupted(f"stopped by {signal.Signals(heard[0]).name}; the same command resumes", 128 + heard[0])
    return int(any(worker.returncode for worker in workers))


def _killed(worker: subprocess.Popen, left: int) -> str:
    name = signal.Signals(-worker.returncode).name
    why = " (is there enough memory?)" if name == "SIGKILL" else ""
    what = "take its run over" if left else "the same command resumes"
    others = {0: "none is left; ", 1: "the other one will "}.get(left, f"the other {left} will ")
    return f"warning: a worker (process {worker.pid}) was killed by {name}{why}; {others}{what}"
