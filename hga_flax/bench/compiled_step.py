"""Compiles train.py's step for devices that may be absent, and collects the costs that the compiler reports."""

import dataclasses
import time
from typing import Any

IMAGENET = 1_281_167  # training images; sets the schedule's length, which does not affect the costs


def compile_step(
    config: Any, topology: str, mesh: Any, platform: str, batch: int, top: int = 0
) -> dict[str, Any] | None:
    """Compiles the training step of a configuration for the devices of a mesh.

    Args:
        config: a complete configuration; its batch size is replaced and its compilation cache ignored.
        topology: name of the topology, for the report.
        mesh: mesh of the devices, see `topology_mesh`.
        platform: platform of the devices, see `topology_mesh`.
        batch: images per device.
        top: number of kernels to list, those that move the most bytes.

    Returns:
        The row that `--json` prints, with all quantities per device and step; None if the device runs out of memory.

    Raises:
        UserError: the configuration cannot be run.
    """
    from hga_flax.counting.compiled import cost, heaviest

    config = config.copy_and_resolve_references()
    config.training.batch_size = batch * mesh.devices.size
    config.training.compilation_cache = ""  # programs for absent devices cannot be loaded back from it
    step, state, shapes = training_step(config, mesh)
    start = time.monotonic()
    try:
        compiled = step.trace(state, shapes).lower(lowering_platforms=(platform,)).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    measured = cost(compiled)
    row = {"topology": topology, "chips": mesh.devices.size, "batch_per_chip": batch}
    row |= {"model": config.model.name, "attention": config.model.attention}
    row |= dataclasses.asdict(measured)
    row |= roofline(measured, mesh.devices.flat[0], batch, mesh.devices.size)
    row |= {"compile_s": round(time.monotonic() - start, 1)}
    return row | ({"top": heaviest(compiled, top)} if top else {})


def training_step(config: Any, mesh: Any) -> tuple[Any, Any, Any]:
    """Returns train.py's step for the devices of a mesh, and the shapes of its state and batch.

    Raises:
        UserError: the configuration cannot be run.
    """
    from hga_flax.data.sources import dataset_info
    from hga_flax.processes.settings import configure_process
    from hga_flax.training.experiment import create_experiment, make_plan
    from hga_flax.training.state import abstract_state
    from hga_flax.training.step import make_train_step

    configure_process(config)
    experiment = create_experiment(config, lambda: dataset_info(config.data.name, config.data.dir), mesh=mesh)
    plan = make_plan(config, max(IMAGENET, config.training.batch_size))
    optimizer = experiment.optimizer(experiment.schedule(plan))
    state = abstract_state(experiment.init(optimizer), mesh)
    return make_train_step(experiment.model, optimizer, config, mesh), state, experiment.abstract_batch


def roofline(measured: Any, device: Any, batch: int, chips: int) -> dict[str, Any]:
    """Returns the shortest step time that a chip's published limits allow, and which limit binds.

    Args:
        measured: a `hga_flax.counting.compiled.Cost`.
        device: one chip.
        batch: images per chip.
        chips: number of chips in the topology.
    """
    from hga_flax.counting.devices import limits

    limit = limits(device)
    moved = measured.bytes_accessed if measured.main_memory_bytes is None else measured.main_memory_bytes
    exchanged = sum(entry["bytes"] for entry in measured.collectives.values())
    seconds = {
        "compute": measured.flops / limit.flops,
        "memory": moved / limit.memory_bandwidth,
        # An all-reduce over a ring or torus sends each value about twice: reduce-scatter, then all-gather.
        "links": 2 * exchanged * (chips - 1) / chips / limit.link_bandwidth if chips > 1 else 0.0,
    }
    bound = max(seconds, key=seconds.get)
    return {
        "memory_capacity_bytes": int(limit.memory_bytes),
        "seconds": seconds,
        "bound": bound,
        "roofline_s": seconds[bound],
        "images_per_s": batch / seconds[bound],
    }
