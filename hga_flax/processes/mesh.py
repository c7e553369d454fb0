"""The device mesh, with a single axis over which the batch is split, and the placement of arrays on it."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from hga_flax.errors import ConfigError

DATA_AXIS = "data"


def create_mesh() -> Mesh:
    """Returns a mesh of all devices of all processes, along the `data` axis."""
    return Mesh(np.asarray(jax.devices()), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of host or device arrays, equal in all processes, to every device."""
    # Through NumPy, so that in a pod each process fills its own devices without a collective.
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x)), tree)


def check_batch_size(key: str, batch_size: int, devices: int) -> None:
    """Raises ConfigError unless the number of devices divides the global batch."""
    if batch_size % devices:
        below, above = batch_size // devices * devices, (batch_size // devices + 1) * devices
        tries = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(f"{key}={batch_size}: does not divide over {devices} devices; try {tries}")


def check_training_batch(config: ConfigDict, devices: int) -> None:
    """Raises ConfigError if that many devices cannot train on their parts of the batch."""
    training = config.training
    batch_size, parts = training.batch_size, training.accumulation_steps
    check_batch_size("training.batch_size", batch_size, devices)
    each, rest = divmod(batch_size // devices, parts)
    if rest or not each:
        raise ConfigError(
            f"training.accumulation_steps={parts}: does not divide the {batch_size // devices} images of each of the "
            f"{devices} devices; training.batch_size={max(1, each) * parts * devices} would do"
        )
    in_parts = f" in each of the {parts} parts of training.accumulation_steps" if parts > 1 else ""
    if (config.data.mixup or config.data.cutmix) and each % 2:
        raise ConfigError(
            f"training.batch_size={batch_size}: data.mixup and data.cutmix mix pairs, so each of "
            f"the {devices} devices needs an even number of images{in_parts}"
        )
    if training.freeze_batch_stats:
        return
    if batch_size // parts == 1:
        raise ConfigError(f"training.batch_size={batch_size}: batch normalisation needs at least 2 images{in_parts}")
    if each == 1 and training.batch_norm_scope == "device":
        raise ConfigError(
            f"training.batch_norm_scope='device': a batch of {batch_size} leaves each of the {devices} devices one "
            f"image{in_parts}, which has no batch statistics; choose 'global', or "
            f"training.batch_size={2 * devices * parts}"
        )


def most_devices(config: ConfigDict, limit: int) -> int:
    """Returns the largest number of devices, up to a limit, that can train on their parts of the batch; at least 1."""
    for devices in range(limit, 1, -1):
        try:
            check_training_batch(config, devices)
            check_batch_size("evaluation.batch_size", config.evaluation.batch_size, devices)
            return devices
        except ConfigError:
            pass
    return 1


def to_devices(batches: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Places this process's part `[b, ...]` of each global batch on its devices, one batch ahead of its use."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    place = lambda x: jax.make_array_from_process_local_data(sharding, x)
    ahead = None
    for batch in batches:
        placed = {name: place(value) for name, value in batch.items()}
        if ahead is not None:
            yield ahead
        ahead = placed
    if ahead is not None:
        yield ahead


def agree(value: int) -> int:
    """Broadcasts the first process's value to all processes and returns it."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def all_true(value: bool) -> bool:
    """Returns whether the value is true in all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value)))) if jax.process_count() > 1 else value


def wait_for_all(name: str) -> None:
    """Blocks until all processes reach this barrier, which `name` distinguishes from others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
