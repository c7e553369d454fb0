"""`python -m hga_flax soak`: trains once undisturbed and once with SIGKILLs, and compares the two bit for bit.

    soak --config=FILE [--kills=N] [--workdir=DIR] [--seed=N] [--json] [--config.key=value]

The kills come at random times: every other one while a checkpoint is being written, one in five while
a session starts, the rest at any time. After each kill the same command resumes the run.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from hga_flax.config.command_line import add_config_flags, add_import_flag, imported_modules
from hga_flax.config.loading import configure, to_json, validate
from hga_flax.errors import UserError, expand, one_line
from hga_flax.runs.clock import TIMINGS

# A session equivalent to `train.py`, which is not part of the installed package.
SESSION = """
import sys
from hga_flax.errors import run_main
def main():
    from hga_flax.config.command_line import import_module
    from hga_flax.config.loading import from_json
    from hga_flax.training.trainer import train
    for name in sys.argv[3:]:
        import_module(name)
    train(from_json(sys.argv[1]), sys.argv[2])
run_main(main)
"""
LAST_TARGET = 0.8  # share of the run; with a later target, the run might end before the kill


@dataclasses.dataclass
class Kill:
    """One kill: when it was planned, and what it interrupted.

    Attributes:
        aim: "start", "anywhere" or "checkpoint".
        target: the kill waits until this step is logged or saved.
        step: last step logged or saved at the time of the kill.
        phase: what it interrupted: "training", "writing a checkpoint", or "start" (no progress yet).
        seconds: time since the session's start.
    """

    aim: str
    target: int
    step: int = 0
    phase: str = ""
    seconds: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config_flags(parser)
    add_import_flag(parser)
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="number of kills (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random times of the kills (default: 0)"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="new or empty folder, which is kept (default: a temporary one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Runs the soak test and prints the result.

    Returns:
        0 if the results are identical, else 1.

    Raises:
        UserError: invalid arguments, or a session that failed or finished before its kill.
    """
    if arguments.kills < 1:
        raise UserError(f"--kills={arguments.kills}: must be at least 1")
    config = validate(configure(arguments.config, arguments.overrides, arguments.recipe))
    folder = _folder(arguments.workdir)
    result = soak(config, folder, arguments.kills, random.Random(arguments.seed), print)
    if arguments.workdir is None and result["identical"]:
        shutil.rmtree(folder)  # keep it for inspection if something went wrong
    print(result["verdict"])
    if arguments.json:
        print(json.dumps(result))
    return 0 if result["identical"] else 1


def _folder(path: str | None) -> pathlib.Path:
    if path is None:
        return pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    folder = expand(path, "--workdir").absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir={path}: soak needs a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def soak(
    config: Any, folder: pathlib.Path, kills: int, chance: random.Random, say: Callable[[str], None]
) -> dict[str, Any]:
    """Trains in `folder/undisturbed` and, with kills, in `folder/killed`, and compares the two.

    Args:
        config: configuration of the run.
        folder: parent of both workdirs.
        kills: number of kills.
        chance: random generator for the times of the kills.
        say: called with each line to show.

    Returns:
        `kills` (list), `checkpoint_writes_hit`, `differences` (list), `identical`, `verdict` and the seconds taken.

    Raises:
        UserError: a session failed or finished before its kill.
    """
    whole, killed = folder / "undisturbed", folder / "killed"
    start = time.monotonic()
    say(f"training undisturbed in {whole}")
    _finish(_start(config, whole))
    undisturbed = time.monotonic() - start
    total = _progress(whole)
    say(f"{total} steps in {undisturbed:.0f} s; training again in {killed}, {kills} kills to come")
    say(f"{'kill':>4}  {'session s':>9}  {'step':>8}  {'aimed at':<10}  hit")
    made = plan_kills(kills, total, chance)
    for number, kill in enumerate(made, 1):
        _kill(_start(config, killed), killed, kill, total, undisturbed, chance)
        say(f"{number:>4}  {kill.seconds:>9.1f}  {kill.step:>8}  {kill.aim:<10}  {kill.phase}")
    _finish(_start(config, killed))
    differences = compare(killed, whole)
    hit = sum(kill.phase == "writing a checkpoint" for kill in made)
    same = "identical" if not differences else f"DIFFERENT: {'; '.join(differences)}; see {folder}"
    verdict = f"{kills} kills, {hit} of them while a checkpoint was written: the runs are {same}"
    return {
        "kills": [dataclasses.asdict(kill) for kill in made],
        "checkpoint_writes_hit": hit,
        "steps": total,
        "differences": differences,
        "identical": not differences,
        "verdict": verdict,
        "seconds_undisturbed": undisturbed,
        "seconds": time.monotonic() - start,
    }


def plan_kills(number: int, total: int, chance: random.Random) -> list[Kill]:
    """Draws the aim and target step of each kill, sorted by step."""
    targets = sorted(chance.randrange(max(1, math.floor(total * LAST_TARGET))) for _ in range(number))
    aims = ["checkpoint" if i % 2 == 0 else "start" if i % 10 in (3, 7) else "anywhere" for i in range(number)]
    return [Kill(aim, target) for aim, target in zip(aims, targets, strict=True)]


def _start(config: Any, workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SESSION, to_json(config), str(workdir), *imported_modules()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen) -> None:
    _, error = process.communicate()
    if process.returncode:
        raise UserError(f"a session ended with exit code {process.returncode}: {one_line(error)[-500:]}")


def _kill(
    process: subprocess.Popen, workdir: pathlib.Path, kill: Kill, total: int, usual: float, chance: random.Random
) -> None:
    """Waits for the right time, kills the process and records what the kill interrupted.

    Args:
        process: the process to kill.
        workdir: workdir of its run.
        kill: `aim` and `target` are set; the other fields are filled in.
        total: total steps of the run.
        usual: seconds that the undisturbed run takes.
        chance: random generator for the exact time.
    """
    start = time.monotonic()
    before, left = _progress(workdir), _writing(workdir)  # leftovers of an earlier kill stay until the next save
    if kill.aim == "start":
        moment = start + chance.uniform(0.0, min(4.0, usual / 6))  # most sessions take longer to reach their first step
        _until(process, lambda: time.monotonic() > moment)
    else:
        goal = min(max(kill.target, before + 1), total)  # require progress, unless the last step is already logged
        _until(process, lambda: _progress(workdir) >= goal)
        if kill.aim == "checkpoint":
            _until(process, lambda: bool(_writing(workdir) - left), pause=0.0005)
            time.sleep(chance.uniform(0.0, 0.03))
        else:
            moment = time.monotonic() + chance.uniform(0.0, min(0.5, usual / 60))
            _until(process, lambda: time.monotonic() > moment)
    process.send_signal(signal.SIGKILL)
    kill.seconds = time.monotonic() - start
    _, error = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise UserError(_over(process, error))
    kill.step = _progress(workdir)
    moved = kill.step > before
    kill.phase = "writing a checkpoint" if _writing(workdir) - left else "training" if moved else "start"


def _until(process: subprocess.Popen, condition: Callable[[], bool], pause: float = 0.01) -> None:
    while not condition():
        if process.poll() is not None:
            raise UserError(_over(process, process.communicate()[1]))
        time.sleep(pause)


def _over(process: subprocess.Popen, error: str) -> str:
    if process.returncode:
        return f"a session ended with exit code {process.returncode}: {one_line(error)[-500:]}"
    return "the run ended before a kill; give it more steps or checkpoints (checkpoint.every_steps), or fewer --kills"


def _writing(workdir: pathlib.Path) -> set[tuple[str, int, int]]:
    """Returns the incomplete checkpoints as (name, inode, modification time), to tell old ones from new ones."""
    found = set()
    folder = workdir / "checkpoints"
    for path in folder.glob("*.orbax-checkpoint-tmp*") if folder.is_dir() else ():
        try:
            facts = path.stat()
        except FileNotFoundError:  # just completed
            continue
        found.add((path.name, facts.st_ino, facts.st_mtime_ns))
    return found


def _progress(workdir: pathlib.Path) -> int:
    """Returns the last step logged or saved; 0 at the start."""
    steps = [0]
    folder, lines = workdir / "checkpoints", workdir / "metrics.jsonl"
    if folder.is_dir():
        steps += [int(name) for name in os.listdir(folder) if name.isdecimal()]
    if lines.is_file():
        steps += [row["step"] for row in _rows(workdir)]
    return max(steps)


def _rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the logged rows without timings; skips a last line that a kill cut short."""
    rows = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.append({key: value for key, value in row.items() if key not in TIMINGS})
    return rows


def compare(ours: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """Returns the differences between two finished workdirs: last state (bit for bit), best checkpoint and log."""
    import jax
    import numpy as np

    from hga_flax.runs.checkpoints import Checkpoints
    from hga_flax.training.restore import restore_workdir

    differences = []
    a, b = (restore_workdir(str(workdir), "latest") for workdir in (ours, expected))
    if a.step != b.step:
        differences.append(f"the last step is {a.step} instead of {b.step}")
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(b.state)]
    for name, x, y in zip(names, jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            differences.append(f"{name} differs")
    bests = []
    for workdir in (ours, expected):
        checkpoints = Checkpoints(workdir, read_only=True)
        best = checkpoints.best_step()
        bests.append((best, None if best is None else checkpoints.metrics(best)))
        checkpoints.close()
    if bests[0] != bests[1]:
        differences.append(f"the best checkpoint is {bests[0]} instead of {bests[1]}")
    lines = _rows(ours), _rows(expected)
    if lines[0] != lines[1]:
        at = next((i for i, (x, y) in enumerate(zip(*lines, strict=False), 1) if x != y), min(map(len, lines)) + 1)
        differences.append(f"metrics.jsonl differs from line {at}")
    return differences
