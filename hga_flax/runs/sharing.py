"""How the processes of a run share its checkpoints: one folder that all of them see, or a local copy for each."""

import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hga_flax.errors import UserError
from hga_flax.processes.distributed import barrier
from hga_flax.processes.mesh import agree, all_true, wait_for_all
from hga_flax.runs.local_copy import is_local_copy


class SharedFolder:
    """One folder that every process sees: all write and restore together, and process 0 decides for all."""

    def group(self) -> set[int] | None:
        """Returns the processes that save and restore together; None means all."""
        return None

    def check_same(self, steps: Sequence[int], folder: pathlib.Path) -> None:
        """Raises a UserError if the processes see different checkpoints."""

    def to_save(self, state: Any) -> Any | None:
        """Returns the state that this process writes, or None if it writes nothing."""
        return state

    def decide(self, own: bool) -> bool:
        """Returns what counts for this process, given its own observation of the folder."""
        return bool(agree(own))

    def wait(self, name: str) -> None:
        """Blocks until all processes that save together are here."""
        wait_for_all(name)

    def damage(self, find: Callable[[], str | None]) -> str | None:
        """Returns the damage that `find` reports; all processes get one or none, so that all restore the same step."""
        damage = find() if jax.process_index() == 0 else None
        return None if agree(damage is None) else damage or "another process says so"


class LocalCopies(SharedFolder):
    """A local copy of the bucket for each process: process 0 writes, and each process reads its own copy."""

    def group(self) -> set[int]:
        return {jax.process_index()}

    def check_same(self, steps: Sequence[int], folder: pathlib.Path) -> None:
        barrier("all have the checkpoints")
        if (own := zlib.crc32(str(steps).encode()) >> 1) != agree(own):
            raise UserError(f"the processes find different checkpoints in {folder}; does another run write?")

    def to_save(self, state: Any) -> Any | None:
        barrier("a checkpoint can be saved")
        # Host arrays are saved without the other processes.
        return None if jax.process_index() else jax.tree.map(np.asarray, state)

    def decide(self, own: bool) -> bool:
        return own

    def wait(self, name: str) -> None:
        pass

    def damage(self, find: Callable[[], str | None]) -> str | None:
        damage = find()
        return None if all_true(damage is None) else damage or "another process says so"


def sharing(folder: pathlib.Path) -> SharedFolder:
    """Returns how the processes of this command share a run's folder."""
    return LocalCopies() if jax.process_count() > 1 and is_local_copy(folder) else SharedFolder()
