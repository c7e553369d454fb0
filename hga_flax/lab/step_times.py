"""Times the training steps of a study's rows, which take turns on one machine."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from hga_flax.bench.race import race
from hga_flax.config.checks import complete
from hga_flax.config.loading import from_json
from hga_flax.errors import UserError
from hga_flax.lab import hardware
from hga_flax.lab.results import STEP_TIMES
from hga_flax.lab.runs import write_text
from hga_flax.lab.study import fingerprint

ROUNDS = 11


def measure(study: str, described: dict[str, Any], folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Times the training steps of all rows in turn and saves the medians in the study's folder.

    It uses as many devices and threads as the study's runs. Call before JAX initialises its devices.

    Args:
        study, described, folder: the study, from `results.locate`.
        say: called with each line to show.

    Raises:
        UserError: a row has not been started, or cannot be trained here.
    """
    rows = list(described["rows"])
    for row in rows:
        if not (folder / row / "row.json").is_file():
            raise UserError(f"{folder}: --time needs every row, and '{row}' has not been started: run the study")
    hardware.arrange_as_recorded(folder)
    turns = []
    for row in rows:
        say(f"compiling {row} ...")
        turns.append(_turn(folder / row))
    timings = race(turns, ROUNDS)
    kept = hardware.facts(hardware.present()) | {"rounds": ROUNDS}
    kept["step_ms"] = {row: timing.median * 1e3 for row, timing in zip(rows, timings, strict=True)}
    kept["networks"] = {row: fingerprint(folder / row) for row in rows}
    write_text(folder / STEP_TIMES.format(study=study), json.dumps(kept, indent=1) + "\n")


def _turn(folder: pathlib.Path) -> Callable[[int], None]:
    """Compiles a row's training step and returns a function that runs a given number of steps."""
    import jax

    from hga_flax.data.sources import dataset_info
    from hga_flax.platforms import programs_for
    from hga_flax.processes.settings import configure_process
    from hga_flax.training.experiment import create_experiment, prepare
    from hga_flax.training.state import create_state
    from hga_flax.training.step import make_train_step

    config = complete(from_json((folder / "row.json").read_text()))
    configure_process(config)
    experiment = create_experiment(config, lambda: dataset_info(config.data.name, config.data.dir))
    prepared = prepare(experiment)
    optimizer = experiment.optimizer(prepared.schedule)
    zeros = lambda leaf: jax.device_put(jax.numpy.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    batch = jax.tree.map(zeros, experiment.abstract_batch)
    step = make_train_step(experiment.model, optimizer, config, experiment.mesh)
    held = [create_state(prepared.init, config.seed, experiment.mesh)]
    with programs_for(experiment.mesh.devices.flat[0]):  # like training, in whose compilation cache the step is
        compiled = step.lower(held[0], batch).compile()

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0], report = compiled(held[0], batch)
        jax.block_until_ready((held[0], report))

    run(1)
    return run
