"""Trains a network, or resumes a run that was stopped.

python train.py --config=configs/digits.py --workdir=runs/digits [--config.key=value ...]
python train.py --config=configs/digits.py --dry-run     checks and describes the run without making it

Exit codes: 0 finished, 1 an error (one line), 143 stopped by SIGTERM, 130 by Ctrl-C, 129 by SIGHUP, 138 by
SIGUSR1. A stopped run has saved its last step; repeat the command to resume it.
"""

from hga_flax import STARTED
from hga_flax.errors import ArgumentParser, UserError, run_main
from hga_flax.processes.huge_pages import use_huge_pages


def main() -> None:
    from hga_flax.config.command_line import add_import_flag  # imported late, so that huge pages cost no time
    from hga_flax.config.loading import parse_arguments
    from hga_flax.processes import distributed

    first, _, codes = __doc__.partition("\n\n")
    codes = " ".join(codes.split("\n\n")[1].split())
    parser = ArgumentParser(description=f"{first} {codes}")
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder for checkpoints and metrics; a stopped run resumes from it"
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        nargs="?",
        const="lower",
        choices=("lower", "compile"),
        help="check everything, print the model, the schedule, memory and time, then exit; needs no --workdir; "
        "--dry-run=compile also compiles the step to find its exact memory",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=5,
        default=0,
        metavar="STEPS",
        help="trace this many steps (default: 5) for TensorBoard's profile page",
    )
    add_import_flag(parser)
    distributed.add_flags(parser)
    arguments, config = parse_arguments(parser)
    if arguments.workdir is None and arguments.dry_run is None:
        raise UserError("--workdir=DIR is missing: the folder for checkpoints and metrics; or try --dry-run")
    if arguments.profile < 0:
        raise UserError(f"--profile={arguments.profile}: the number of steps cannot be negative")
    if arguments.dry_run is not None:
        for flag in ("profile", "coordinator", "num_processes", "process_id"):
            if (value := getattr(arguments, flag)) or (value == 0 and flag == "process_id"):
                raise UserError(f"--{flag.replace('_', '-')}={value}: has no effect with --dry-run; leave it out")
        from hga_flax.bench.dry_run import dry_run  # imported late, so that --help and errors are quick

        dry_run(config, arguments.workdir, compile_step=arguments.dry_run == "compile")
        return
    distributed.start(arguments, config)
    from hga_flax.training.trainer import train

    distributed.together(config, lambda: train(config, arguments.workdir, arguments.profile, STARTED))


if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
