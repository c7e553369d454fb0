"""The device mesh, with a single axis over which the batch is split, and the placement of arrays on it."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError unless the number of devices divides the global batch."""
    devices = mesh.devices.size
    if batch_size % devices:
        below, above = batch_size // devices * devices, (batch_size // devices + 1) * devices
        tries = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(f"{key}={batch_size}: does not divide over {devices} devices; try {tries}")


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
