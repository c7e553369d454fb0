"""Runs the project's commands as a user does: a process of its own, one CPU device, no TensorFlow."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = ROOT / "tests" / "without_tensorflow"  # holds a package `tensorflow` that refuses to be imported


def environment(devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}" if devices else ""
    path = os.pathsep.join(filter(None, [str(BLOCK), os.environ.get("PYTHONPATH")]))
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path, "COLUMNS": "120"}


def command(*arguments):
    return [sys.executable, *map(str, arguments)]


def run(*arguments, devices=1, timeout=500):
    """Returns the finished process; `arguments` follow `python`. With 0 devices the command decides their number."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=timeout
    )


def start(*arguments):
    """Returns the started process; its output stays in the pipes, which hold 64 KiB, until somebody reads it."""
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
