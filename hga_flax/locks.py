"""Lock files: one process of this machine at a time. The kernel releases a lock, however its process ends."""

import fcntl
import pathlib
from typing import TextIO


def lock(file: pathlib.Path, wait: bool) -> TextIO | None:
    """Locks a file, which is created where it is missing, until what is returned is closed.

    Args:
        file: to be locked; its folder is created too.
        wait: for another process that has it.

    Returns:
        The open file, or None where another process has it.

    Raises:
        OSError: it cannot be created, or its file system has no locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    opened = file.open("w")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    except OSError:
        opened.close()
        raise
    return opened
