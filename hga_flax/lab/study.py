"""Reads study files: one recipe, its variants (rows), the seeds, and the baseline of each row.

A study is a Python file whose `get_study()` returns a dictionary, or a TOML file, with these keys:

    config          the recipe, a file of configs/
    rows            {name: overrides}; an override is "key=value" as on train.py's command line
    baseline        the row that the others are compared with, or {row: its baseline}
    seeds           a list, or a number n for 0 ... n - 1; they change `config.seed` and nothing else
    overrides       optional: overrides for all rows
    about           optional: the question that the study answers, a line or a paragraph for the report
    name            optional: default is the file's name
    directory       optional: folder of the runs, default runs/studies/NAME; studies with the same folder share
                    rows of the same name, which must have the same configuration
    scales          optional: {name: overrides for all rows}, the same study in several sizes; `--scale=NAME` selects
                    one, default is the first; each has its own runs and report, NAME_SCALE
    budget_minutes  optional: a worker starts no run that it does not expect to finish within this many minutes
    threads         optional: XLA's threads for each run on CPUs; their number changes the results (default 1)
    devices         optional: GPUs (or simulated CPU devices) for each run; their number changes the results (default 1)
"""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from hga_flax.config.checks import complete, without_effect
from hga_flax.config.keys import WHOLE
from hga_flax.config.loading import (
    configure,
    differences,
    from_json,
    load_config,
    missing,
    overridden,
    override,
    to_json,
    validate,
)
from hga_flax.errors import ConfigError, UserError, expand, nearest, one_line

REQUIRED = ("config", "rows", "baseline", "seeds")
OPTIONAL = ("overrides", "about", "name", "directory", "scales", "budget_minutes", "threads", "devices")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
MOST_PARTS = 1024  # most threads or devices of a run
CLAIMS = "claims"  # a folder beside the rows' folders
# Keys that do not change results: runs that differ only in these may be resumed and compared.
MACHINE_KEYS = (
    "data.dir",
    "data.num_threads",
    "data.num_workers",
    "data.cache_mb",
    "training.log_every_steps",
    "training.grace_seconds",
    "training.lost_process_seconds",
    "training.compilation_cache",
    "checkpoint.every_steps",
    "checkpoint.keep",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A variant of the recipe.

    Attributes:
        name: name of the row and of its folder.
        overrides: overrides of the recipe in train.py's format, those for all rows first.
        baseline: the row to compare with, or None.
        config: complete configuration; its seed is that of the recipe.
        own: those of `overrides` that the row itself has, not all rows.
    """

    name: str
    overrides: tuple[str, ...]
    baseline: str | None
    config: ConfigDict
    own: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A study read from a file; the module's docstring describes the fields.

    `threads` and `devices` are 0 if the file does not set them; `hardware.settle` then determines them.
    """

    name: str
    file: str
    config: str
    rows: dict[str, Row]
    seeds: tuple[int, ...]
    directory: pathlib.Path
    overrides: tuple[str, ...] = ()
    about: str = ""
    budget_minutes: float = 0.0
    threads: int = 0
    devices: int = 0


def load_study(
    file: str,
    directory: str | None = None,
    *,
    check: bool = True,
    scale: str | None = None,
    overrides: Sequence[str] = (),
) -> Study:
    """Reads a study file and configures all its rows.

    Args:
        file: path of a Python or TOML file.
        directory: folder for the runs, instead of the file's.
        check: also build each row's network, as training does before the first step.
        scale: one of the file's scales; None uses the first, if there are any.
        overrides: overrides for all rows in train.py's format, applied after the file's own.

    Raises:
        UserError: the file, a row, or the configuration of a row is invalid. Nothing has been run.
    """
    values = _read(file)
    _check_keys(file, values)
    name = values.get("name", pathlib.Path(file).stem)
    if not isinstance(name, str) or not NAME.fullmatch(name) or name == "hardware":  # of hardware.json in its folder
        raise UserError(f"{file}: name={name!r}: letters, digits and . _ + - only, and not 'hardware'")
    scale, of_scale = _scale(file, values.get("scales"), scale)
    common = (*_overrides(f"{file}: overrides", values.get("overrides", [])), *of_scale)
    flags = _overrides(file, overrides)
    rows = _rows(file, values, common, flags, check)
    ending = f"_{scale}" if scale else ""
    name += ending
    where = directory or (f"{values['directory']}{ending}" if values.get("directory") else f"runs/studies/{name}")
    return Study(
        name=name,
        file=file,
        config=values["config"],
        rows=rows,
        seeds=_seeds(file, values["seeds"]),
        directory=expand(where, "directory"),
        overrides=(*common, *flags),
        about=" ".join(values.get("about", "").split()),
        budget_minutes=float(values.get("budget_minutes", 0.0)),
        threads=values.get("threads", 0),
        devices=values.get("devices", 0),
    )


def _read(file: str) -> Any:
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(missing(file, "get_study"))
    try:
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text())
        spec = importlib.util.spec_from_file_location(f"study_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"{file}: a study is a Python or a TOML file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_study()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: {type(error).__name__}: {one_line(error)}") from None


def _check_keys(file: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{file}: get_study() returns {type(values).__name__}, not a dictionary")
    if missing := [key for key in REQUIRED if key not in values]:
        raise UserError(f"{file}: '{missing[0]}' is missing; a study needs {', '.join(REQUIRED)}")
    known = (*REQUIRED, *OPTIONAL)
    if unknown := [key for key in values if key not in known]:
        raise UserError(f"{file}: there is no key '{unknown[0]}'{nearest(str(unknown[0]), known)}")
    for key in ("config", "about", "name", "directory"):
        if not isinstance(values.get(key, ""), str):
            raise UserError(f"{file}: {key}={values[key]!r} must be a string")
    minutes = values.get("budget_minutes", 0.0)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < float("inf"):
        raise UserError(f"{file}: budget_minutes={minutes!r} must be a number of minutes, 0 for no limit")
    for key in ("threads", "devices"):
        value = values.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_PARTS:
            raise UserError(f"{file}: {key}={value!r} must be a whole number from 1 to {MOST_PARTS}")


def _seeds(file: str, seeds: Any) -> tuple[int, ...]:
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= WHOLE
    if whole(seeds) and seeds > 0:
        return tuple(range(seeds))
    listed = isinstance(seeds, list | tuple) and len(seeds) > 0 and all(map(whole, seeds))
    if not listed or len(set(seeds)) < len(seeds):
        raise UserError(
            f"{file}: seeds={seeds!r}: give a number of seeds or a list of different seeds, from 0 to {WHOLE}"
        )
    return tuple(seeds)


def _scale(file: str, scales: Any, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """Returns name and overrides of the wanted scale; "" and () for a study without scales."""
    if scales is None:
        if wanted is not None:
            raise UserError(f"--scale={wanted}: {file} has no scales")
        return "", ()
    named = isinstance(scales, dict) and scales and all(isinstance(n, str) and NAME.fullmatch(n) for n in scales)
    if not named:
        raise UserError(f"{file}: scales must be a dictionary of names and overrides, with at least one scale")
    scale = next(iter(scales)) if wanted is None else wanted
    if scale not in scales:
        raise UserError(
            f"--scale={scale}: {file} has no such scale{nearest(scale, scales)}; it has: {', '.join(scales)}"
        )
    return scale, _overrides(f"{file}: scale '{scale}'", scales[scale])


def _rows(
    file: str, values: Mapping[str, Any], common: tuple[str, ...], flags: tuple[str, ...], check: bool
) -> dict[str, Row]:
    named = values["rows"]
    if not isinstance(named, dict) or not named:
        raise UserError(f"{file}: rows must be a dictionary of names and overrides, with at least one row")
    baselines = _baselines(file, values["baseline"], list(named))
    rows: dict[str, Row] = {}
    for name, own in named.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == CLAIMS:
            raise UserError(f"{file}: row {name!r}: letters, digits and . _ + - only, and not '{CLAIMS}'")
        its_own = _overrides(f"{file}: row '{name}'", own)
        if clash := {overridden(flag) for flag in flags} & {overridden(argument) for argument in its_own}:
            raise UserError(f"--config.{min(clash)}: applies to all rows, but row '{name}' of {file} has its own")
        try:
            overrides = _with_flags(values["config"], (*common, *its_own), flags)
            config = configure(values["config"], overrides)
            if check:
                validate(config)
        except ConfigError as error:
            raise UserError(f"{file}: row '{name}': {error}") from None
        for other in rows.values():
            folders = {row_config.data.dir for row_config in (other.config, config) if config.data.name == "folder"}
            if identity(other.config) == identity(config) and len(folders) < 2:
                remedy = "with these flags: leave them out, or remove one" if flags else "remove one"
                raise UserError(f"{file}: rows '{other.name}' and '{name}' have the same configuration; {remedy}")
        rows[name] = Row(name, overrides, baselines[name], config, tuple(o for o in overrides if o in its_own))
    if len({row.config.training.deterministic for row in rows.values()}) > 1:
        raise UserError(
            f"{file}: training.deterministic applies to a whole process: set it in overrides, for all rows, or make "
            "two studies"
        )
    return rows


def _with_flags(path: str, of_file: tuple[str, ...], flags: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a row's overrides and then the flags, without the overrides that the flags leave without effect."""
    if not flags:
        return of_file
    configure(path, of_file)  # each must have an effect in the file itself
    config = override(load_config(path), (*of_file, *flags))
    return (*(argument for argument in of_file if not without_effect(config, overridden(argument))), *flags)


def _overrides(where: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
        raise UserError(f'{where}: give a list of strings like "model.attention=se"')
    overrides = tuple(f"--config.{item.removeprefix('--config.')}" for item in given)
    for argument in overrides:
        if "=" not in argument:
            raise UserError(f"{where}: {argument!r} is not KEY=VALUE")
        if argument.startswith("--config.seed="):
            raise UserError(f"{where}: use the study's key 'seeds' instead of {argument}")
    return overrides


def _baselines(file: str, given: Any, names: Sequence[str]) -> dict[str, str | None]:
    baselines = given if isinstance(given, dict) else {name: given for name in names if name != given}
    for name, baseline in baselines.items():
        for row in (name, baseline):
            if row not in names:
                raise UserError(f"{file}: baseline: there is no row {row!r}{nearest(str(row), map(str, names))}")
        if name == baseline:
            raise UserError(f"{file}: baseline: row '{name}' is compared with itself")
    return {name: baselines.get(name) for name in names}


def with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    """Returns a copy of a configuration with another seed."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.seed = seed
    return copy.lock()


def identity(config: ConfigDict) -> str:
    """Returns a text that is the same for runs that differ only in their seeds and `MACHINE_KEYS`."""
    values = json.loads(to_json(config))
    values.pop("seed")
    for key in MACHINE_KEYS:
        group, _, name = key.partition(".")
        values[group].pop(name, None)
    return json.dumps(values, sort_keys=True)


def fingerprint(folder: pathlib.Path) -> str | None:
    """Returns a checksum of what makes a row's runs what they are; None if the row has not been started."""
    try:
        return hashlib.sha256(identity(complete(from_json((folder / "row.json").read_text()))).encode()).hexdigest()
    except (OSError, ValueError, UserError):
        return None


def changes(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns the differences that make two configurations different runs, as "key: old -> new"."""
    return [change for change in differences(old, new) if change.partition(": ")[0] not in ("seed", *MACHINE_KEYS)]


def check_same_rows(study: Study) -> None:
    """Checks that the rows in the study's folder belong to this study.

    Raises:
        UserError: a row there was started with another configuration.
    """
    for row in study.rows.values():
        begun = study.directory / row.name / "row.json"
        if not begun.exists():
            continue
        try:
            old = complete(from_json(begun.read_text()))
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{begun} cannot be read: {one_line(error)}") from None
        if changed := changes(old, row.config):
            raise UserError(
                f"{study.directory}: row '{row.name}' was started with another configuration ({'; '.join(changed)}); "
                "choose another directory, give the row another name, or give the --scale and the flags of those runs"
            )
