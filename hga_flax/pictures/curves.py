"""Reads the curves of runs from metrics.jsonl, and the paper's values for their networks."""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hga_flax.errors import UserError, one_line
from hga_flax.runs import workdir as files

EVALUATED = "cross_entropy"  # the loss logged by evaluation, whatever the training loss is


class Curve(NamedTuple):
    """A metric's values by step; non-finite values are NaN."""

    steps: list[int]
    values: list[float]


class PaperValue(NamedTuple):
    """A metric's value in the paper, and the table that has it."""

    table: str
    value: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to be drawn.

    Attributes:
        label: name in the legend.
        curves: the curves by name, such as "train/loss" and "eval/top1_error".
        steps_per_epoch: number of steps in an epoch; None if the x axis shows steps.
        paper: the paper's values by metric, such as "top1_error".
        damaged: number of lines that could not be read.
        other_loss: name of the training loss if it differs from the evaluation's cross entropy; else "".
    """

    label: str
    curves: dict[str, Curve]
    steps_per_epoch: float | None
    paper: dict[str, PaperValue]
    damaged: int
    other_loss: str = ""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Returns (epochs or steps, values) of a curve, both empty if there is no such curve."""
        steps, values = self.curves.get(name, Curve([], []))
        return [step / (self.steps_per_epoch or 1) for step in steps], values


def read_curves(file: pathlib.Path) -> tuple[dict[str, Curve], int]:
    """Reads a metrics.jsonl and returns (curves by name, number of damaged lines).

    A run that was killed may have repeated steps it had already logged: within a curve, a line replaces all earlier
    lines of the same or later steps. Non-finite values become NaN, which leaves a gap.

    Raises:
        UserError: the file cannot be read, or holds no metrics.
    """
    try:
        lines = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no run here, or none that has logged anything (no metrics.jsonl)") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or one_line(error)}") from None
    curves: dict[str, Curve] = {}
    damaged = 0
    for line in lines:
        try:
            row = json.loads(line)
            step = row.pop("step")
            values = {name: math.nan if value is None else float(value) for name, value in row.items()}
            if type(step) is not int or any("/" not in name for name in values):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged += bool(line.strip())
            continue
        for name, value in values.items():
            curve = curves.setdefault(name, Curve([], []))
            while curve.steps and curve.steps[-1] >= step:
                curve.steps.pop()
                curve.values.pop()
            curve.steps.append(step)
            curve.values.append(value)
    if not curves:
        raise UserError(f"{file}: it holds no metrics")
    return curves, damaged


def read_run(path: str, label: str | None, epochs: bool) -> Run:
    """Reads the run in a workdir; without a readable config.json only its curves are known.

    Args:
        path: the workdir.
        label: name in the legend; None uses the names of the folder, the network and the attention.
        epochs: use epochs for the x axis; needs the data set, for its size.

    Raises:
        UserError: the run has no curves, or epochs are requested and the data set is not available.
    """
    from hga_flax.runs.local_copy import find  # loads JAX, which the callers of read_curves do not need

    workdir = find(path, "WORKDIR", light=True)
    curves, damaged = read_curves(workdir / "metrics.jsonl")
    try:
        config = files.read_config(workdir)
        name = f"{workdir.name} ({config.model.name}, {config.model.attention})"
        paper = paper_values(config)
        per_epoch = steps_per_epoch(workdir, config) if epochs else None
        loss = config.training.loss
    except (UserError, AttributeError) as error:  # AttributeError: a configuration without the key
        if epochs:
            raise UserError(f"{path}: its epochs are not known, try --x=step: {error}") from None
        name, paper, per_epoch, loss = workdir.name, {}, None, EVALUATED
    return Run(label or name, curves, per_epoch, paper, damaged, "" if loss == EVALUATED else loss)


def with_folders(runs: Sequence[Run], paths: Sequence[str], given: Sequence[str | None]) -> list[Run]:
    """Returns the runs; where labels are equal, with as many folders before the run's own as make them distinct.

    Args:
        runs: the runs.
        paths: the workdir of each.
        given: the labels to keep as they are; None for those that `read_run` made.
    """
    folders = [(path if "://" in path else os.path.abspath(path)).rstrip("/").split("/") for path in paths]
    labels = [run.label for run in runs]
    for depth in range(1, max(map(len, folders))):
        often = collections.Counter(labels)
        labels = [
            "/".join([*folder[-1 - depth : -1], run.label]) if often[label] > 1 and own is None else label
            for label, run, folder, own in zip(labels, runs, folders, given, strict=True)
        ]
    return [dataclasses.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def steps_per_epoch(workdir: pathlib.Path, config: ConfigDict) -> float:
    """Returns the number of steps in an epoch of a run.

    Raises:
        UserError: the data set is no longer where it was.
    """
    from hga_flax.data.pipeline import Dataset

    dataset = Dataset(files.read_dataset(workdir), config.data, config.seed)
    return len(dataset.open(config.data.train_split)) / config.training.batch_size


def paper_values(config: ConfigDict) -> dict[str, PaperValue]:
    """Returns the errors that the paper's tables report for a run's network and data set; {} if there are none.

    The network must be exactly that of the tables, without options that change it.
    """
    from hga_flax.config.loading import parse_options
    from hga_flax.models.registry import model_options
    from hga_flax.paper.published import TABLES
    from hga_flax.paper.results import network_key

    model = config.model
    if config.data.fake or config.data.name not in ("imagenet2012", "cifar10", "cifar100"):
        return {}
    try:
        default = model_options(model.name)
        own = parse_options(model.options, "model.options")
        same = {"zero_init_residual": True}  # this initialisation does not make it a different network
        if default | own | same != default | same:
            return {}
        options = parse_options(model.attention_options, "model.attention_options")
        key = network_key(model.name, model.attention, options, config.data.name)
    except (ValueError, UserError):  # the user's own attention, or one that has been removed
        return {}
    found: dict[str, PaperValue] = {}
    for table, (_, rows) in TABLES.items():
        for row in rows():
            if network_key(row.model, row.attention, row.options, row.dataset) == key:
                for metric in ("top1_error", "top5_error"):
                    value: Any = getattr(row, metric)
                    if value is not None:
                        found.setdefault(metric, PaperValue(f"Table {table[-1]}", value))
    return found
