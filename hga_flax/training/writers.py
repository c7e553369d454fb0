"""Where metrics go: TensorBoard's event files and metrics.jsonl. Written by process 0 alone."""

import contextlib
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from hga_flax.config import config_keys, get_key, to_json
from hga_flax.training.metrics import finite_or_none
from hga_flax.training.workdir import write_text


class MetricWriter:
    """Writes scalars to `workdir/tensorboard` and `workdir/metrics.jsonl`.

    Args:
        workdir: the folder of the run.
        step: the step that the run starts or goes on from; what an earlier, killed run wrote
            about later steps is dropped, so that no step appears twice.
        active: False makes every method do nothing (processes other than the first).
    """

    def __init__(self, workdir: pathlib.Path, step: int, active: bool = True):
        self._writer: SummaryWriter | None = None
        if not active:
            return
        lines = workdir / "metrics.jsonl"
        _drop_after(lines, step)
        self._lines = lines.open("a")
        # Event files are named by the second: the suffix keeps a quick restart from overwriting the last one.
        suffix = f".{step:08}.{os.getpid()}"
        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge, filename_suffix=suffix)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        """Writes values under "group/name"; a value that is not finite is null in the JSON."""
        if self._writer is None:
            return
        named = {f"{group}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            self._writer.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step} | finite_or_none(named)) + "\n")
        self.flush()

    def config(self, config: ConfigDict, metrics: list[str]) -> None:
        """Writes the configuration as text and as hyperparameters whose results are `metrics`."""
        if self._writer is None:
            return
        self._writer.add_text("config", "    " + to_json(config).replace("\n", "\n    "), 0)
        values: dict[str, Any] = {}
        for key in config_keys(config):
            value = get_key(config, key)
            values[key] = value if isinstance(value, bool | int | float | str) else str(value)
        experiment, start, _ = hparams(values, {name: 0.0 for name in metrics})
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(start)
        self.flush()

    def flush(self) -> None:
        """Makes what was written visible to readers."""
        if self._writer is not None:
            self._lines.flush()
            self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._lines.close()
            self._writer.close()


def _drop_after(file: pathlib.Path, step: int) -> None:
    """Drops the lines about later steps, and a last line that a kill cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(file, "".join(kept))
