"""Times the training steps of a study's rows, which take turns on one machine."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from hga_flax.bench.race import race
from hga_flax.config.checks import complete
from hga_flax.config.loading import from_json
from hga_flax.errors import UserError
from hga_flax.lab.results import STEP_TIMES
from hga_flax.lab.runs import write_text

ROUNDS = 11


def measure(results: dict[str, Any], say: Callable[[str], None]) -> None:
    """Times the training steps of all rows in turn and saves the medians in the study's folder.

    Args:
        results: results loaded from the study's folder; sets each row's `step_ms`.
        say: called with each line to show.

    Raises:
        UserError: the results are from a saved report, or a row cannot be trained here.
    """
    import jax

    folder = pathlib.Path(results["directory"])
    if not folder.is_dir():
        raise UserError(f"{folder}: not here; --time needs the study's folder, not a saved report")
    turns = []
    for row in results["rows"]:
        if not (folder / row["row"] / "row.json").is_file():
            raise UserError(f"{folder}: --time needs every row, and '{row['row']}' has not been started: run the study")
    for row in results["rows"]:
        say(f"compiling {row['row']} ...")
        turns.append(_turn(folder / row["row"]))
    timings = race(turns, ROUNDS)
    for row, timing in zip(results["rows"], timings, strict=True):
        row["step_ms"] = timing.median * 1e3
    kept = {"device": jax.devices()[0].device_kind, "rounds": ROUNDS}
    kept["step_ms"] = {row["row"]: row["step_ms"] for row in results["rows"]}
    write_text(folder / STEP_TIMES.format(study=results["study"]), json.dumps(kept, indent=1) + "\n")


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
