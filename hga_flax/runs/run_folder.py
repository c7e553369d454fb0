"""The folder in which a run is trained: claimed, so that a second command is refused, and copied to its bucket."""

import contextlib
import pathlib
from collections.abc import Iterator

from hga_flax.errors import Interrupted, TemporaryError, UserError, leave
from hga_flax.processes.coordination import barrier
from hga_flax.runs.local_copy import LocalCopy, find
from hga_flax.runs.manifest import CLAIM
from hga_flax.runs.uploader import BucketUploader, Uploader
from hga_flax.runs.workdir import open_workdir
from hga_flax.storage.buckets import is_remote
from hga_flax.storage.locks import Claim, claimed, surely_lost


def _claimed(path: str) -> contextlib.AbstractContextManager[Claim]:
    """Prevents other commands from training in a folder, also on other machines that share it."""
    line = f"--workdir={path}: another command trains there: {{}}; wait for its end, or choose another --workdir"
    return claimed(
        open_workdir(path),
        CLAIM,
        taken=lambda who: TemporaryError(line.format(who)),
        say=lambda text: print(f"{path}: {text}", flush=True),
        lost=lambda: _lost(path),
    )


def _lost(path: str) -> None:
    leave(1, f"error: --workdir={path} was removed or taken over by another command; this one stops")


@contextlib.contextmanager
def run_folder(path: str, process: int) -> Iterator[tuple[pathlib.Path, Uploader]]:
    """Yields the folder in which a run is trained, and its uploader, which works in process 0 of a run in a bucket.

    A folder on this machine or on a shared file system is claimed by process 0 until the end: a second command that
    wants to train there is refused. For a run in a bucket each process has its own local copy, and only process 0
    writes; call the uploader's `begin` once the run is known to be the right one. On exit, blocks until everything is
    in the bucket.

    Args:
        path: workdir as given by the user.
        process: index of this process.

    Raises:
        UserError: the workdir cannot be used, or something cannot be uploaded.
    """
    if not is_remote(path):
        uploader = Uploader()
        with contextlib.ExitStack() as held:
            if process == 0:
                claim = held.enter_context(_claimed(path))
                uploader = Uploader(lambda: _lost(path) if surely_lost(claim) else None)
            barrier("process 0 has the run")
            yield open_workdir(path), uploader
        return
    uploader, folder = Uploader(), None
    if process == 0:
        uploader = BucketUploader(LocalCopy(path, "--workdir", trains=True))
        folder = uploader.catch_up()
    barrier("the bucket holds what process 0 has")
    folder = folder or find(path)
    barrier("each has the run")
    try:
        yield folder, uploader
    except BaseException as error:
        if isinstance(error, Interrupted) and not error.alone:
            _finish(uploader)
        else:
            with contextlib.suppress(UserError):  # the run's own error is the one to report
                uploader.close()
        raise
    _finish(uploader)


def _finish(uploader: Uploader) -> None:
    """Uploads the rest while the other processes wait; call only where all processes stop at the same step."""
    uploader.close()
    barrier("process 0 has uploaded")
