"""Uploads a session's local copy to the bucket from a thread (see local_copy.py).

Each complete checkpoint is uploaded, its manifest last; then checkpoints that the session dropped are deleted, the
manifest first. One that is missing here for another reason, such as a cleared cache, stays in the bucket. Other files
are uploaded whole before each checkpoint, so that a run resumed from it has every line up to it, and every 30 s. A
step that is saved again stays in the bucket as `superseded/STEP` until the new checkpoint is complete there, as it
does here.
"""

import contextlib
import json
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from hga_flax.errors import UserError, one_line
from hga_flax.runs import manifest
from hga_flax.runs.local_copy import CHECKPOINT, Here, LocalCopy, Overtaken
from hga_flax.runs.workdir import NEWEST
from hga_flax.storage.buckets import Unreachable

POLL_SECONDS = 1.0
LOG_SECONDS = 30.0
WAIT_SECONDS = 20.0  # training that waits for an upload for longer says so
PAUSES = (5.0, 15.0)  # seconds before retrying a checkpoint; the libraries themselves retry for 7 to 50 s


class Uploader:
    """What checkpoints and the training loop know of the bucket and the claim of a run; this one has no bucket.

    Args:
        check: called before a checkpoint is written; ends the process if another one has taken over the folder.
    """

    def __init__(self, check: Callable[[], None] = lambda: None):
        self.check = check

    def begin(self, warn: Callable[[str], None]) -> None:
        """Starts uploading, once the run is known to be the right one; `warn` takes one line for each failure."""

    def dropped(self, step: int) -> None:
        """Allows the bucket's checkpoint of a step to be deleted, as soon as it is gone here."""

    def finish(self) -> None:
        """Blocks until every complete checkpoint is uploaded."""

    def close(self) -> None:
        """Uploads the rest and ends."""


class BucketUploader(Uploader):
    """Copies a local copy of a run to its bucket from `begin` to `close`.

    Args:
        copy: local copy that the session trains in.
    """

    def __init__(self, copy: LocalCopy):
        super().__init__()
        self._copy, self._warn = copy, print
        self._remote, self._folder = copy.remote, copy.folder
        self._busy, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = self._given_up = False
        self._dropped: set[int] = set()
        self._undeletable = False  # the last attempt to delete a checkpoint failed
        self._listed = True  # whether the local copy knows the bucket's files; it does not after a failed attempt

    def dropped(self, step: int) -> None:
        """Allows the bucket's checkpoint of a step to be deleted, as soon as it is gone here."""
        self._dropped.add(step)

    def catch_up(self) -> pathlib.Path:
        """Syncs with the bucket, uploads what an earlier session could not, and returns the local copy's folder.

        Raises:
            UserError: the bucket cannot be read, or a checkpoint missing there cannot be uploaded.
        """
        try:
            self._copy.pull()
            self._upload_new()
        except BaseException:
            self._copy.close()
            raise
        return self._folder

    def begin(self, warn: Callable[[str], None]) -> None:
        """Starts the upload thread.

        Args:
            warn: called with one line when an upload fails.

        Raises:
            UserError: the bucket is not writable.
        """
        self._warn = warn
        self._copy.begin(uuid.uuid4().hex)
        self._thread = threading.Thread(target=self._run, daemon=True, name="uploader")
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic() + LOG_SECONDS
        while not self._over.wait(POLL_SECONDS):
            try:
                with self._busy:
                    if self._push_checkpoints() or time.monotonic() >= due:
                        self._push_others()
                        due = time.monotonic() + LOG_SECONDS
            except Overtaken:  # `finish` and `close` raise it too
                return
            except (UserError, OSError) as error:  # `finish` and `close` retry
                due = time.monotonic() + LOG_SECONDS
                self._warn_once(f"warning: {one_line(error)}; it is tried again")

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)

    def finish(self) -> None:
        """Blocks until every complete checkpoint is in the bucket.

        Raises:
            UserError: a checkpoint cannot be uploaded.
        """
        line = f"waiting for {self._remote.address}: a checkpoint is being uploaded"
        with _said_after(WAIT_SECONDS, lambda: self._warn(line)), self._busy:
            for pause in (*PAUSES, None):
                try:
                    self._push_checkpoints()
                    return
                except (Unreachable, OSError) as error:  # OSError: from this machine's disk
                    if pause is None:
                        self._given_up = True
                        raise UserError(
                            f"the newest checkpoint cannot be uploaded: {one_line(error)}; the ones before are kept "
                            "there, it is kept here, and the same command on this machine uploads it and resumes"
                        ) from error
                    time.sleep(pause)

    def close(self) -> None:
        """Blocks until everything is in the bucket, and releases the local copy.

        Raises:
            UserError: a checkpoint cannot be uploaded; other files only cause a warning.
            Overtaken: another session has begun there.
        """
        self._over.set()
        try:
            if self._thread is not None:
                self._thread.join()
            if self._thread is not None and not self._given_up:
                self.finish()
                self._push_last()
        finally:
            self._copy.close()

    def _push_last(self) -> None:
        try:
            self._push_others()
        except (Unreachable, OSError) as error:
            self._warn(
                f"warning: {one_line(error)}; the checkpoints are there, but not all of the metrics and other files"
            )

    def _steps(self, folder: str) -> set[int]:
        with contextlib.suppress(FileNotFoundError):
            return {int(path.name) for path in (self._folder / folder).iterdir() if path.name.isdecimal()}
        return set()

    def _push_checkpoints(self) -> bool:
        """Makes the bucket's checkpoints equal to the local ones; returns whether anything had to be done."""
        if not self._listed:
            self._copy.uploaded([])
        self._listed = False
        uploaded = self._upload_new()
        removed = (uploaded or not self._undeletable) and self._remove_old()
        self._listed = True
        return uploaded or removed

    def _upload_new(self) -> bool:
        new = self._new()
        if new:
            try:
                self._push_others()
            except (Unreachable, OSError) as error:  # still upload the checkpoint
                self._warn_once(f"warning: {one_line(error)}; it is tried again")
        done = [files for step in new if (files := self._push_checkpoint(step))]
        if new:
            self._copy.uploaded(file for files in done for file in files)
        return bool(done)

    def _new(self) -> list[int]:
        """Returns the steps that are complete here but not yet in the bucket."""
        complete = [step for step in sorted(self._steps("checkpoints")) if (self._folder / _manifest(step)).exists()]
        return [step for step in complete if not self._copy.is_up(_manifest(step))]

    def _remove_old(self) -> bool:
        # checkpoints/ is listed before and after superseded/, so that no step that moves meanwhile is missed.
        kept = self._steps("checkpoints") | self._steps("superseded") | self._steps("checkpoints")
        if self._new():  # completed since `_upload_new` looked, or its upload failed: older steps are still needed
            return False
        folders = {match[1] for name in self._copy.there if (match := CHECKPOINT.fullmatch(name))}
        gone = []
        try:
            for folder in sorted(folders):
                kind, step = folder.split("/")
                again = kind == "superseded" and _manifest(int(step)) in self._copy.there
                complete = f"{folder}/{manifest.NAME}" in self._copy.there
                if again or (int(step) not in kept and (int(step) in self._dropped or not complete)):
                    gone.append(folder)
                    self._remove(folder)
            self._undeletable = False
        except Unreachable as error:  # costs only space; tried again after the next checkpoint
            if not self._undeletable:
                self._warn(f"warning: {one_line(error)}; checkpoints that are no longer kept stay there")
            self._undeletable = True
        if gone:
            self._copy.uploaded([])
        return bool(gone)

    def _push_checkpoint(self, step: int) -> list[tuple[str, Here]] | None:
        """Uploads a complete checkpoint and returns its files, or None if it is being deleted here."""
        folder = f"checkpoints/{step}"
        try:
            files = [p.relative_to(self._folder).as_posix() for p in (self._folder / folder).rglob("*") if p.is_file()]
            here = {name: self._copy.stat(name) for name in files}
            last = _manifest(step)
            wanted = json.loads((self._folder / last).read_text())["files"]
            if not {f"{folder}/{name}" for name in wanted} <= here.keys():
                return None
            self._copy.check_own()
            old = [name for name in self._copy.there if name.startswith(f"{folder}/")]
            if last in old:  # otherwise an earlier attempt has already put it aside
                self._put_aside(step, [name.removeprefix(f"{folder}/") for name in old])
                self._remote.delete([last])
            self._remote.put(self._folder, [name for name in here if name != last])
            self._remote.put(self._folder, [last])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        self._remote.delete(name for name in old if name not in here)
        return list(here.items())

    def _put_aside(self, step: int, names: list[str]) -> None:
        """Copies a step's former checkpoint to `superseded/`, its manifest last."""
        old, new = f"checkpoints/{step}", f"superseded/{step}"
        self._remote.delete([f"{new}/{manifest.NAME}"])  # the manifest of an earlier superseded checkpoint
        self._remote.copy([name for name in names if name != manifest.NAME], old, new)
        self._remote.copy([manifest.NAME], old, new)

    def _remove(self, folder: str) -> None:
        """Deletes a checkpoint from the bucket, its manifest first."""
        self._copy.check_own()
        names = [name for name in self._copy.there if name.startswith(f"{folder}/")]
        self._remote.delete([f"{folder}/{manifest.NAME}"])
        self._remote.delete(names)

    def _push_others(self) -> None:
        """Uploads changed files other than checkpoints."""
        names = [name for name in self._copy.here() if _is_other(name) and not self._copy.is_up(name)]
        if NEWEST in names and not self._newest_is_up():
            names.remove(NEWEST)
        with contextlib.suppress(FileNotFoundError):
            here = [(name, self._copy.stat(name)) for name in names]
            if here:
                self._copy.check_own()
                self._remote.put(self._folder, names)
                self._copy.uploaded(here)

    def _newest_is_up(self) -> bool:
        """Returns whether the step in newest_checkpoint.json is in the bucket; otherwise it would count as lost."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            step = json.loads((self._folder / NEWEST).read_text())["step"]
            return _manifest(step) in self._copy.there
        return False


@contextlib.contextmanager
def _said_after(seconds: float, say: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _manifest(step: int) -> str:
    return f"checkpoints/{step}/{manifest.NAME}"


def _is_other(name: str) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    return parts[0] not in ("checkpoints", "superseded") and not any(part.startswith(".") for part in parts)
