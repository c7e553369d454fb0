"""Checkpoints with Orbax: saves asynchronously, keeps the latest N and the best, restores the newest intact one.

A checkpoint holds two items: `state` (the TrainState) and `run` (JSON: the trainer's progress and the evaluation
that the checkpoint was saved with). Its manifest shows whether it is intact.

checkpoints/STEP       complete checkpoints; only Orbax writes and deletes here
damaged/STEP           unreadable checkpoints, moved here when an older one was restored; never deleted
superseded/STEP        the former checkpoint of a step that is being saved again, until the new one is complete
newest_checkpoint.json the last complete step, so that a run that lost all its checkpoints does not restart from zero
"""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hga_flax.errors import TemporaryError, UserError, one_line
from hga_flax.processes.coordination import raise_if_lost
from hga_flax.runs import manifest, saved_state
from hga_flax.runs.progress import Progress
from hga_flax.runs.ranking import Evaluations, LatestAndBest
from hga_flax.runs.sharing import sharing
from hga_flax.runs.uploader import Uploader
from hga_flax.runs.workdir import check_name, entries, free_name, newest_complete, write_newest_complete

Warn = Callable[[str], None]
TEMPORARY = ".orbax-checkpoint-tmp"  # part of the name of an incomplete checkpoint
NO_UPLOADER = Uploader()


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: folder of the run; the checkpoints are in its subfolder `checkpoints`.
        keep: number of latest checkpoints to keep, in addition to the best.
        read_only: never create, write or delete anything.
        warn: called with one line for each unreadable checkpoint.
        changes: differences from the configuration that they were saved with ("key: old -> new").
        uploader: copies the run to its bucket, if it has one.

    Raises:
        UserError: the processes see different checkpoints (each has its own local copy).
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        keep: int = 3,
        *,
        read_only: bool = False,
        warn: Warn = print,
        changes: Sequence[str] = (),
        uploader: Uploader = NO_UPLOADER,
    ):
        self._workdir, self._directory = workdir.absolute(), workdir.absolute() / "checkpoints"
        self._keep, self._read_only, self._warn = keep, read_only, warn
        self._changes = list(changes)
        self._manager: ocp.CheckpointManager | None = None
        self._writing: int | None = None
        if not read_only:
            check_name(self._directory)
        self._failed = False  # the last checkpoint could not be written
        self._sharing, self._uploader = sharing(self._workdir), uploader
        self._reader = self._checkpointer(ocp.CompositeCheckpointHandler(handler_registry=_handlers()))
        self._evaluations = Evaluations(lambda step: self._read_run(step, self._path(step))["evaluation"], warn)
        self._sharing.check_same(self.steps, self._workdir, writes=not read_only)

    def save(self, step: int, state: Any, run: dict[str, Any], metrics: dict[str, Any] | None) -> None:
        """Starts writing a checkpoint; returns once the state is copied off the devices.

        An existing checkpoint of the same step stays readable until the new one is complete.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        self._uploader.check()
        try:
            self.wait()
        except UserError as error:  # the disk may have space again
            if self._failed:  # twice in a row
                raise
            self._failed = True
            self._warn(f"warning: {error}; step {step} is written now")
        self._uploader.finish()  # saving may delete the checkpoint that is being uploaded
        if (state := self._sharing.to_save(state)) is None:
            return
        with self._written(step):
            if self._sharing.decide(self._directory.joinpath(str(step)).exists()):
                self._supersede(step)
            if self._manager is None:
                self._manager = self._create_manager()
            self._writing, self._evaluations[step] = step, metrics
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), run=ocp.args.JsonSave({"run": run, "evaluation": metrics})
            )
            self._manager.save(step, args=items, force=True)

    def _processes(self) -> ocp.options.MultiprocessingOptions:
        """Returns the processes that Orbax synchronises."""
        group, own = self._sharing.group(), jax.process_index()
        return ocp.options.MultiprocessingOptions(*((own, group, f"process_{own}") if group else ()))

    def _checkpointer(self, handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
        return ocp.Checkpointer(handler, multiprocessing_options=self._processes())

    def _create_manager(self) -> ocp.CheckpointManager:
        self._directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            create=False,  # Orbax cannot create folders for a subset of the processes
            multiprocessing_options=self._processes(),
            preservation_policy=LatestAndBest(self._keep, self._evaluations, self._uploader.dropped),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(self._directory, options=options, handler_registry=_handlers())

    def _seal(self) -> None:
        """Writes the manifest; Orbax calls this on process 0 once all items are complete, before the final rename."""
        self._uploader.check()
        step = self._writing
        folder = min(self._directory.glob(f"{step}{TEMPORARY}*"), default=self._directory / str(step))
        if not (folder / "state" / "manifest.ocdbt").exists():  # Orbax only warns
            raise OSError("Orbax has not joined the arrays of its processes")
        manifest.write_manifest(folder, step)

    def _supersede(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._workdir / "superseded"
            aside.mkdir(exist_ok=True)
            self._directory.joinpath(str(step)).rename(aside / str(step))
        self._sharing.wait("superseded")
        if self._manager is not None:
            self._manager.reload()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, intact or not, in ascending order."""
        return sorted({step for step, _ in entries(self._workdir)})

    def _path(self, step: int) -> pathlib.Path:
        """Raises an `UnreadableCheckpoint` if a run in training has removed the step since it was listed."""
        if path := dict(entries(self._workdir)).get(step):
            return path
        raise self._unreadable(self._directory / str(step), "it is gone")

    def _may_be_removed(self) -> bool:
        """With several processes no: each would list others then, and not all the same."""
        return self._read_only and jax.process_count() == 1

    def _unreadable(self, path: pathlib.Path, why: str) -> manifest.UnreadableCheckpoint:
        return manifest.unreadable(path, why, may_be_removed=self._may_be_removed())

    def _reading(self, path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
        return manifest.reading(path, may_be_removed=self._may_be_removed())

    def best_step(self) -> int | None:
        """Returns the step with the best evaluation, or None if no kept step was evaluated."""
        return next(iter(self._evaluations.best_first(self.steps())), None)

    def metrics(self, step: int) -> dict[str, Any] | None:
        """Returns the evaluation saved with a checkpoint; None if there is none or (with a warning) it is damaged."""
        return self._evaluations[step]

    def progress(self, step: int) -> Progress:
        """Returns the progress saved with a checkpoint.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        return Progress.restored(self._read_run(step, self._path(step))["run"])

    def _read_run(self, step: int, path: pathlib.Path) -> dict[str, Any]:
        with self._reading(path):
            if damage := manifest.find_damage(path, step, "run"):
                raise self._unreadable(path, damage)
            return self._run_item(path)

    def _run_item(self, path: pathlib.Path) -> dict[str, Any]:
        item = self._reader.restore(path, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        if not isinstance(item, dict) or not {"run", "evaluation"} <= item.keys():
            what = "it has no progress and evaluation where this version writes them"
            raise self._unreadable(path, f"{what}; read it with the version that wrote it")
        return item

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns (state, run) of a step, with the state placed on devices like the tree `like`.

        Raises:
            UserError: the checkpoint cannot be read, or holds the state of another network.
        """
        return self._restore_alike(step, self._path(step), like)

    def _check_whole(self, step: int, path: pathlib.Path, item: str | None = None) -> None:
        if damage := self._sharing.damage(lambda: manifest.find_damage(path, step, item)):
            raise self._unreadable(path, damage)

    def _restore(self, path: pathlib.Path, like: Any) -> tuple[Any, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with self._reading(path):
            run = self._run_item(path)["run"]
            self._check_structure(path, abstract)
            item = saved_state.placed(self._saved(path), abstract)
            arguments = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item))
            with self._checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(path / "state", args=arguments)
            return saved_state.filled(abstract, restored), run

    def _restore_alike(self, step: int, path: pathlib.Path, like: Any) -> tuple[Any, dict[str, Any]]:
        """Raises an `UnreadableCheckpoint` only if all processes do, so that all try the next one."""
        self._check_whole(step, path)
        try:
            return self._restore(path, like)
        except manifest.UnreadableCheckpoint as error:
            if jax.process_count() == 1:
                raise
            own = f"this is process {jax.process_index()}, and others may have read it, so no other checkpoint is tried"
            raise UserError(f"{error}; {own}: start all processes again") from error

    def _saved(self, path: pathlib.Path) -> Any:
        """Returns the tree of array metadata in a checkpoint."""
        saved = self._reader.metadata(path).item_metadata["state"]
        return getattr(saved, "tree", saved)

    def restore_weights(self, step: int) -> tuple[str, dict[str, Any]]:
        """Returns "ema" or "raw", and {"params", "batch_stats"} of a step as NumPy arrays; the average if kept.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        path = self._path(step)
        with self._reading(path), self._checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            self._check_whole(step, path)
            saved = self._saved(path)
            names = ("ema",) if saved.get("ema") else ("params", "batch_stats")
            wanted = {name: saved[name] for name in names}
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            state = reader.restore(path / "state", args=ocp.args.PyTreeRestore(wanted, kinds, partial_restore=True))
        return ("ema", state["ema"]) if "ema" in state else ("raw", state)

    def restore_best(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns (step, state, run) of the best intact checkpoint, or None if no kept step was evaluated.

        Damaged checkpoints are reported through `warn` and skipped.

        Raises:
            UserError: none of the evaluated checkpoints can be read, or they belong to another network;
                a `RemovedCheckpoint` if training has removed one since it was listed.
        """
        ranked = self._evaluations.best_first(self.steps())
        for place, step in enumerate(ranked, 1):
            try:
                return step, *self.restore(step, like)
            except manifest.RemovedCheckpoint:
                raise
            except manifest.UnreadableCheckpoint as error:
                self._warn(f"warning: {error}" + ("; trying the next best" if place < len(ranked) else ""))
        if ranked:
            raise UserError(f"none of the {len(ranked)} evaluated checkpoints in {self._directory} can be read")
        return None

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Returns (step, state, run) of the newest intact checkpoint, or None if there never was one.

        Damaged checkpoints are reported through `warn`, skipped and, unless read-only, moved to `damaged/`.

        Raises:
            UserError: there are or were checkpoints, but none can be read, or they belong to another network;
                a `RemovedCheckpoint` as in `restore_best`.
        """
        self.wait()  # a checkpoint that is still being written counts too
        found, bad = entries(self._workdir), []
        once = newest_complete(self._workdir)
        while found:
            step, path = found.pop()
            try:
                state, run = self._restore_alike(step, path, like)
            except manifest.RemovedCheckpoint:
                raise
            except manifest.UnreadableCheckpoint as error:
                self._warn(f"warning: {error}" + ("; trying the one before" if found else ""))
                bad.append(path)
                continue
            if once is not None and step < once and not any(int(path.name) >= once for path in bad):
                self._warn(f"warning: the checkpoint of step {once}, which was complete, is gone from {path.parent}")
            if not self._read_only and jax.process_index() == 0:
                with self._written(step):
                    self._tidy(step, path, bad)
            return step, state, run
        if bad:
            raise UserError(
                f"none of the {len(bad)} checkpoints in {self._directory} can be read; "
                "mend or move that folder, or choose another --workdir"
            )
        if once is not None:
            raise UserError(
                f"{self._directory} holds no checkpoint, but this run had one of step {once}; put it back, "
                "or choose another --workdir"
            )
        return None

    def _tidy(self, step: int, path: pathlib.Path, bad: Sequence[pathlib.Path]) -> None:
        """Moves damaged checkpoints out of the way of future steps, and cleans up after a kill during `save`."""
        for damaged in bad:
            target = free_name(self._workdir / "damaged", damaged.name)
            damaged.rename(target)
            self._uploader.dropped(int(damaged.name))
            self._warn(f"{damaged} is now {target}")
        if path.parent != self._directory:
            path.rename(self._directory / str(step))
        self._drop_superseded()

    def _drop_superseded(self) -> None:
        shutil.rmtree(self._workdir / "superseded", ignore_errors=True)

    def check_structure(self, step: int, like: Any) -> None:
        """Raises a UserError if the checkpoint of a step is damaged or holds other arrays than `like`."""
        path = self._path(step)
        with self._reading(path):
            self._check_whole(step, path)
            self._check_structure(path, like)

    def _check_structure(self, path: pathlib.Path, like: Any) -> None:
        """Raises a UserError if the checkpoint's arrays have other names, shapes or dtypes."""
        saved_state.check_same_arrays(str(path), self._saved(path), like, self._changes)

    @contextlib.contextmanager
    def _written(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._writing = None
            self._forget(step)
            raise_if_lost(error)
            full = "No space left" in (text := one_line(error))  # TensorStore's errors have no errno
            reason = os.strerror(errno.ENOSPC) if full else text[:300]
            raise (TemporaryError if full else UserError)(
                f"the checkpoint of step {step} cannot be written in {self._directory}: {reason}; the ones before are "
                "kept, and the same command resumes from the newest"
            ) from error

    def _forget(self, step: int) -> None:
        """Drops Orbax's manager: it counts a step as existing, and keeps it, as soon as it has begun to write it."""
        self._evaluations.forget(step)
        self._close_manager()

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()

    def wait(self) -> None:
        """Blocks until the last checkpoint is complete on disk.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        if self._manager is None or self._writing is None:
            return
        step = self._writing
        with self._written(step):
            try:
                self._manager.wait_until_finished()
            except Exception as error:  # also of deleting older ones
                raise_if_lost(error)
                # With several processes, only process 0 deletes, and only it has the error.
                if jax.process_count() > 1 or manifest.find_damage(self._directory / str(step), step) is not None:
                    raise
                self._warn(f"warning: an old checkpoint cannot be deleted: {one_line(error)[:300]}")
                self._close_manager()
            if jax.process_index() == 0:
                write_newest_complete(self._workdir, step)
                self._drop_superseded()
        self._writing, self._failed = None, False

    def close(self) -> None:
        """Waits for the last checkpoint and stops the writer's threads.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        try:
            self.wait()
        finally:
            self._close_manager()  # suppresses errors: `wait` has raised the relevant one
            self._reader.close()


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Returns the handlers that write and read the items of a checkpoint."""
    state, run = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
    return ocp.handlers.create_default_handler_registry(state=state, run=run)
