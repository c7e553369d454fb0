"""How the processes of a run share its checkpoints: one folder that all of them see, or a local copy for each."""

import pathlib
import random
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hga_flax.errors import UserError
from hga_flax.processes.coordination import barrier
from hga_flax.processes.mesh import agree, all_true, wait_for_all
from hga_flax.runs.local_copy import is_local_copy
from hga_flax.runs.workdir import write_text

SEEN_AFTER = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)  # seconds between looks; NFS keeps attributes for up to a minute


class SharedFolder:
    """One folder that every process sees: all write and restore together, and process 0 decides for all."""

    def group(self) -> set[int] | None:
        """Returns the processes that save and restore together; None means all."""
        return None

    def check_same(self, steps: Callable[[], Sequence[int]], folder: pathlib.Path, *, writes: bool) -> None:
        """Checks that all processes see one folder with the same checkpoints, as each soon does on a network disk.

        Args:
            steps: lists the steps that have a checkpoint.
            folder: the workdir.
            writes: whether the workdir may be written to.

        Raises:
            UserError: they do not.
        """
        if jax.process_count() == 1:
            return
        token, file = agree(random.getrandbits(31)), folder / ".shared"
        if writes and jax.process_index() == 0:
            write_text(file, str(token))
        for wait in (*SEEN_AFTER, None):
            own = zlib.crc32(str(steps()).encode()) >> 1
            if same := all_true(own == agree(own) and (not writes or _read(file) == str(token))):
                break
            if wait is not None:
                time.sleep(wait)
        if writes and jax.process_index() == 0:  # all have read it, or will not
            file.unlink(missing_ok=True)
        if not same:
            raise UserError(
                f"the processes of this run do not see the same folder {folder}: give all of them one on a disk that "
                "they share, or in a bucket"
            )

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

    def check_same(self, steps: Callable[[], Sequence[int]], folder: pathlib.Path, *, writes: bool) -> None:
        barrier("all have the checkpoints")
        if (own := zlib.crc32(str(steps()).encode()) >> 1) != agree(own):
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


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def sharing(folder: pathlib.Path) -> SharedFolder:
    """Returns how the processes of this command share a run's folder."""
    return LocalCopies() if jax.process_count() > 1 and is_local_copy(folder) else SharedFolder()
