"""Writes metrics to TensorBoard event files and metrics.jsonl, in process 0 only."""

import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from hga_flax.config.loading import config_keys, get_key, to_json
from hga_flax.runs.workdir import write_text, writing


def finite_or_none(values: dict[str, float]) -> dict[str, float | None]:
    """Replaces values that are not finite, which JSON cannot represent, with None."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class MetricWriter:
    """Writes scalars to `workdir/tensorboard` and `workdir/metrics.jsonl`.

    It does not use tensorboardX's SummaryWriter, whose thread dies silently when the disk is full; its queue
    then blocks.

    Args:
        workdir: folder of the run.
        step: step from which the run starts or resumes; lines about later steps, written by a killed
            session, are dropped, so that no step appears twice.
        active: False makes every method do nothing (for processes other than process 0).
        again: group whose values at `step` itself are dropped too, because they will be written again.

    Raises:
        UserError: a file cannot be written (also raised by the methods).
    """

    def __init__(self, workdir: pathlib.Path, step: int, *, active: bool = True, again: str | None = None):
        self._active = active
        if not active:
            return
        self._lines_file, folder = workdir / "metrics.jsonl", workdir / "tensorboard"
        with writing(self._lines_file):
            _drop_after(self._lines_file, step, again)
            self._lines = self._lines_file.open("a")
        self._events_file = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            # Event files are named by the second; the suffix keeps a quick restart from overwriting the last file.
            self._events = EventsWriter(str(folder / "events"), f".{step:08}.{os.getpid()}")
        # Tells TensorBoard to discard what it has read about later steps.
        self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self._events_file):
            self._events.write_event(event)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Writes values as "group/name"; values that are not finite become null in the JSON."""
        if not self._active:
            return
        named = {f"{group}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            self._event(Event(step=step, summary=summary.scalar(name, value)))
        with writing(self._lines_file):
            self._lines.write(json.dumps({"step": step} | finite_or_none(named)) + "\n")
        self.flush()

    def config(self, config: ConfigDict, metrics: list[str]) -> None:
        """Writes the configuration as text and as TensorBoard hyperparameters with the result metrics `metrics`."""
        if not self._active:
            return
        text = "    " + to_json(config).replace("\n", "\n    ")
        self._event(Event(step=0, summary=summary.text("config", text)))
        values: dict[str, Any] = {}
        for key in config_keys(config):
            value = get_key(config, key)
            values[key] = value if isinstance(value, bool | int | float | str) else str(value)
        experiment, start, _ = summary.hparams(values, {name: 0.0 for name in metrics})
        self._event(Event(summary=experiment))
        self._event(Event(summary=start))
        self.flush()

    def flush(self) -> None:
        """Flushes both files, so that readers see what was written."""
        if self._active:
            with writing(self._lines_file):
                self._lines.flush()
            with writing(self._events_file):
                self._events.flush()

    def close(self) -> None:
        """Closes the files; never raises, so that it can follow an error."""
        if self._active:
            self._active = False
            with contextlib.suppress(OSError):  # every line was flushed: anything left already failed to write
                self._lines.close()
            with contextlib.suppress(OSError):
                self._events.close()


def _drop_after(file: pathlib.Path, step: int, again: str | None) -> None:
    """Drops lines after `step`, lines of group `again` at `step`, and a last line truncated by a kill."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            repeated = again is not None and values["step"] == step and any(k.startswith(f"{again}/") for k in values)
            if values["step"] <= step and not repeated:
                kept.append(line + "\n")
    write_text(file, "".join(kept))
