"""Writes metrics to TensorBoard event files and metrics.jsonl, in process 0 only."""

import contextlib
import json
import math
import os
import pathlib
import re
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from hga_flax.config.loading import config_keys, get_key, to_json
from hga_flax.runs.workdir import write_text, writing

EVENTS = "events.out.tfevents."
OURS = re.compile(re.escape(EVENTS) + r"\d+\..*\.\d{8}\.\d+")  # and not those of other writers in the folder


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
            for file in folder.glob(f"{EVENTS}*"):
                if OURS.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                    _drop_events_after(file, step, again)
            self._events = RecordWriter(str(folder / _next_name(folder, step)))
        self._event(Event(file_version="brain.Event:2"))
        # Tells a TensorBoard that has read later steps already to discard them.
        self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing(self._events_file):
            self._events.write(event.SerializeToString())

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


def _next_name(folder: pathlib.Path, step: int) -> str:
    """Returns the name of a new file of events, the last in order: TensorBoard reads them in the order of their names.

    They are named by the second. A restart may follow within one, or with a clock that is behind.
    """
    found = (re.match(re.escape(EVENTS) + r"(\d+)\.", file.name) for file in folder.glob(f"{EVENTS}*"))
    second = max([int(time.time()), *(int(match[1]) + 1 for match in found if match)])
    return f"{EVENTS}{second:010}.{socket.gethostname()}.{step:08}.{os.getpid()}"


def _drop_events_after(file: pathlib.Path, step: int, again: str | None) -> None:
    """Drops from a file of events what `_drop_after` drops: not every TensorBoard minds where a session began."""
    data = file.read_bytes()
    kept = b"".join(
        record
        for record, event in _records(data)
        if event.step <= step and not (event.step == step and again is not None and _is_of(event, again))
    )
    if len(kept) < len(data):
        scratch = file.with_name(f".rewritten.{os.getpid()}")
        try:
            scratch.write_bytes(kept)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)


def _is_of(event: Event, group: str) -> bool:
    return any(value.tag.startswith(f"{group}/") for value in event.summary.value)


def _records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """Yields the records of a file of events, each with its event, up to one that cannot be parsed."""
    start = 0
    while start + 12 <= len(data):  # length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        try:
            event = Event.FromString(data[start + 12 : end - 4])
        except Exception:  # protobuf's DecodeError; tensorboardX needs protobuf, and nothing else here
            return
        if end > len(data):
            return
        yield data[start:end], event
        start = end


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
