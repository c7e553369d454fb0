"""Starts the processes of one run on this machine and sees to it that all of them end.

Run as a program it is one of these processes, which something may befall.
"""

import argparse
import os
import signal
import socket
import subprocess
import time

from tests import commands

LOST_SECONDS = 10  # training.lost_process_seconds here
STEPS = 12
FAULTS = ("kill", "error", "bug", "term", "seed")


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(*options, devices=1, folder=commands.ROOT):
    """Returns a process started in `folder`; `options` follow `python`."""
    path = os.pathsep.join([str(commands.BLOCK), str(commands.ROOT)])
    return subprocess.Popen(
        commands.command(*options), cwd=folder, env=commands.environment(devices) | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_processes(*options, count=2, devices=8):
    """Returns processes that share the devices of one run."""
    address = free_address()
    return [
        start(
            *options, f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}",
            devices=devices // count,
        )
        for i in range(count)
    ]  # fmt: skip


def start_pair(*options):
    """Returns two processes that do `main` together."""
    return start_processes("-m", "tests.training.processes", *options, devices=2)


class End:
    """How a process ended: its exit code, what it printed, and when."""

    def __init__(self, code, output, errors):
        self.code, self.output, self.errors = code, output, errors
        # JAX's own lines begin with a letter, month and day.
        self.lines = [line for line in errors.splitlines() if line[:1] not in "IWEF" or not line[1:5].isdigit()]


def finish(processes, seconds=900):
    """Returns the `End` of each, and fails where one is still there after so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        told = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [End(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def befall(fault):
    print(f"now: {time.time()}", flush=True)
    if fault == "error":
        from hga_flax.errors import UserError

        raise UserError("the disk is full")
    if fault == "bug":
        raise ZeroDivisionError
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[fault])


def exchange(due):
    """Stands for a training: waits for the others, then exchanges numbers with them."""
    from hga_flax.processes.coordination import barrier
    from hga_flax.processes.mesh import all_true
    from hga_flax.processes.preemption import Preemption

    with Preemption(25.0) as preemption:
        due(0)
        barrier("the training step is compiled")
        preemption.begin()
        for step in range(1, STEPS + 1):
            all_true(True)
            due(step)


def draw_other_weights():
    """Gives this process another initial state than its configuration says."""
    from hga_flax.training import trainer

    create = trainer.create_state
    trainer.create_state = lambda init, seed, mesh: create(init, seed + 1, mesh)


def train(config, workdir, due):
    """Trains a small network."""
    from hga_flax.training import trainer

    compile_step, after_step = trainer.compile_step, trainer.Loop._after_step

    def due_before(*given):
        due(0)
        return compile_step(*given)

    def due_after(loop, step, *given):
        due(step)
        after_step(loop, step, *given)

    trainer.compile_step, trainer.Loop._after_step = due_before, due_after
    trainer.train(config, workdir)


def main():
    from hga_flax.errors import run_main
    from hga_flax.processes import distributed
    from tests.training import tiny

    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    parser.add_argument("--workdir", help="trains there, else only exchanges numbers")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--of", type=int, help="the process that it befalls")
    parser.add_argument("--at", type=int, help="after which step; 0 is before the first")
    arguments = parser.parse_args()
    config = tiny.config(
        model__attention="none", training__steps=STEPS, checkpoint__every_steps=2,
        training__lost_process_seconds=float(LOST_SECONDS),
    )  # fmt: skip

    def due(step):
        if (arguments.process_id, step) == (arguments.of, arguments.at):
            draw_other_weights() if arguments.fault == "seed" else befall(arguments.fault)

    def work():
        distributed.start(arguments, config)
        distributed.together(
            config, lambda: train(config, arguments.workdir, due) if arguments.workdir else exchange(due)
        )
        print("done", flush=True)

    run_main(work)


if __name__ == "__main__":
    main()
