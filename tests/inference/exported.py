"""Calls the command in this process."""

from hga_flax.__main__ import main


def export(workdir, form, out, *more):
    main(["export", f"--workdir={workdir}", f"--format={form}", f"--out={out}", *more])
