"""`python -m hga_flax study FILE`: runs what a study lacks.

The same command, as often and on as many machines as there are, with the same folder: workers share the runs
through it, go on with those that were interrupted, and leave alone what is made.
"""

import argparse
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from types import FrameType

from hga_flax.errors import Interrupted, UserError

MOST_WORKERS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("file", metavar="FILE", help="a study, such as studies/smoke.py")
    parser.add_argument("--dir", metavar="DIR", help="where the runs go, shared by all workers (default: the file's)")
    add_study_flags(parser)
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes here, which share the cores or GPUs (default: 1)"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="begin no run that would end later (default: the file's budget)"
    )
    parser.add_argument("--retry", action="store_true", help="make runs that failed again")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and an estimate of time, and stop")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # I/N of this machine, of a worker that the command starts


def add_study_flags(parser: argparse.ArgumentParser) -> None:
    """Declares what chooses among the studies that a file holds: `--scale`, and any key of the configuration."""
    parser.add_argument("--scale", metavar="NAME", help="one of the sizes that the file has (default: its first)")
    parser.epilog = "A key of the configuration is a flag too, for all rows: --config.data.name=cifar10"
    parser.set_defaults(takes_overrides=True)


def study_flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags that choose the same study and folder again."""
    named = {"scale": arguments.scale, "dir": arguments.dir}
    return [f"--{name}={value}" for name, value in named.items() if value] + arguments.overrides


def run(arguments: argparse.Namespace) -> int:
    """Makes the missing runs, and returns 1 where one failed.

    Raises:
        UserError: the study, one of its rows, its data or its folder cannot be used.
        Interrupted: a signal ended the command; the same command goes on.
    """
    if not 1 <= arguments.workers <= MOST_WORKERS:
        raise UserError(f"--workers={arguments.workers}: from 1 to {MOST_WORKERS}")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UserError(f"--minutes={arguments.minutes:g}: must be above 0")
    if arguments.part:
        take_part(arguments.part)
    from hga_flax.lab import worker
    from hga_flax.lab.study import check_same_rows, load_study

    study = load_study(
        arguments.file, arguments.dir, check=not arguments.part, scale=arguments.scale, overrides=arguments.overrides
    )
    minutes = study.budget_minutes if arguments.minutes is None else arguments.minutes
    if arguments.part:
        return int(bool(worker.work(study, say, minutes, parent=os.getppid())))
    import jax

    from hga_flax.lab.plan import check_rows, print_plan

    check_same_rows(study)
    if arguments.workers > 1 and not arguments.dry_run:  # the devices are the workers'
        jax.config.update("jax_platforms", "cpu")
    check_rows(study)
    print_plan(study, arguments.workers, estimate=arguments.dry_run)
    if arguments.dry_run:
        return 0
    if arguments.retry:
        worker.clear_failures(study)
    failed = start_workers(arguments) if arguments.workers > 1 else worker.work(study, say, minutes)
    say(f"the report: python -m hga_flax report {shlex.join([arguments.file, *study_flags(arguments)])}")
    return int(bool(failed))


def say(line: str) -> None:
    """Prints a line at once, so that those of several workers do not mix."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def gpus() -> list[str]:
    """Returns the NVIDIA GPUs that a process started here would see, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i, _ in enumerate(sorted(pathlib.Path("/dev").glob("nvidia[0-9]*")))]


def take_part(part: str) -> None:
    """Restricts this process to the I-th of N parts of the machine, before JAX looks at it."""
    index, number = map(int, part.split("/"))
    if devices := gpus():
        own = devices[index::number] or [devices[index % len(devices)]]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        if number > len(devices):  # several share one: none may take all of its memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::number] or [cores[index % len(cores)]])


def start_workers(arguments: argparse.Namespace) -> int:
    """Starts the workers, hands signals on to them, and waits for all.

    Returns:
        1 where a run failed or a worker ended by an error, else 0.

    Raises:
        Interrupted: a signal ended them.
    """
    command = [sys.executable, "-m", "hga_flax", "study", arguments.file, *study_flags(arguments)]
    command += [f"--minutes={arguments.minutes}"] if arguments.minutes else []
    workers: list[subprocess.Popen] = []
    heard: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)
        for worker in workers:
            worker.send_signal(signum)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
    stopping = (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,)))
    before = {signum: signal.signal(signum, hand_on) for signum in stopping}
    try:
        for index in range(arguments.workers):
            # In a session of its own: a terminal's Ctrl-C comes once, from here.
            part = f"--part={index}/{arguments.workers}"
            workers.append(subprocess.Popen([*command, part], start_new_session=True))
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.2)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if heard:
        raise Interrupted(f"stopped by {signal.Signals(heard[0]).name}; the same command goes on", 128 + heard[0])
    for worker in workers:
        if worker.returncode < 0:
            say(f"a worker was killed by {signal.Signals(-worker.returncode).name}; the same command goes on")
    return int(any(worker.returncode for worker in workers))
