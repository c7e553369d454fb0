"""Loads, overrides and checks configurations. A mistake raises a one-line error that names the key."""

import argparse
import ast
import contextlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from hga_flax.config.checks import KINDS, check_given, check_keys, check_together, config_keys, get_key
from hga_flax.config.command_line import add_config_flags, split_overrides
from hga_flax.config.keys import FORMER_NAMES, KEYS
from hga_flax.errors import ConfigError, UserError, nearest, one_line

MOST_DIGITS = 100  # digits of an integer; no key accepts a longer one
# Arguments of create_model that are not options of the network: other keys or the data set determine them.
MODEL_ARGUMENTS = {"attention", "attention_options", "num_classes", "dtype", "axis_name", "features_only", "name"}
OVERRIDE_ERRORS = (flags.Error, TypeError, ValueError, SyntaxError)  # raised for values that cannot be parsed


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses a command's own flags, `--config=FILE`, `--recipe=NAME` and any `--config.key=value`.

    Args:
        parser: parser with the command's own flags; `--config` and `--recipe` are added here.
        arguments: the command line without the command's name; None reads `sys.argv`.

    Raises:
        ConfigError: the file cannot be loaded, or an override has an unknown key, a wrong type or no effect.
    """
    add_config_flags(parser)
    parser.epilog = "Any key of configs/base.py is a flag too: --config.optimizer.learning_rate=0.05"
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(own)
    return parsed, configure(parsed.config, overrides, parsed.recipe)


def configure(path: str, overrides: Sequence[str], recipe: str | None = None) -> ConfigDict:
    """Loads a file, applies a recipe and then `--config.key=value` arguments, and checks the values.

    It does not check the network; `validate` does.

    Raises:
        ConfigError: a file cannot be loaded, or an override has an unknown key, a wrong type or no effect.
    """
    config = load_config(path)
    if recipe is not None:  # it looks at what is trained, and so must see the flags that say so
        what = [argument for argument in overrides if overridden(argument).startswith(("model.", "data."))]
        config = override(config, what)
        apply_recipe(config, recipe)
    config = override(config, overrides)
    check_keys(config)
    check_together(config)
    check_given(config, [overridden(argument) for argument in overrides])
    return config


def overridden(argument: str) -> str:
    """Returns the key of a `--config.key=value` argument, such as "data.name"."""
    name = argument.removeprefix("--config.").split("=")[0]
    return FORMER_NAMES.get(name, name)


def base_config() -> ConfigDict:
    """Returns the configuration of configs/base.py, which is next to the package.

    Raises:
        UserError: the file is missing, for example because only the package is installed.
    """
    path = pathlib.Path(__file__).parents[2] / "configs" / "base.py"
    if not path.is_file():
        raise UserError("--config=FILE is missing: this installation has no configs/base.py to start from")
    return load_config(str(path))


def load_config(path: str) -> ConfigDict:
    """Loads a configuration file: returns the result of its `get_config()`, locked.

    Raises:
        ConfigError: the file does not exist, has no `get_config`, or sets a key that configs/base.py lacks.
    """
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--config={missing(path, 'get_config')}")
    config = _run_file(path, f"--config={path}", lambda module: module.get_config())
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: get_config() returns {type(config).__name__}, not a ConfigDict")
    return config.lock()


def missing(path: str, function: str) -> str:
    """Returns the message that there is no file at `path`, with the files in its folder that define `function`."""
    file = pathlib.Path(path)
    folder = file if file.is_dir() else file.parent
    others = []
    for other in sorted(folder.glob("*.py")):
        with contextlib.suppress(OSError):
            if other.stem != "base" and f"def {function}(".encode() in other.read_bytes():
                others.append(other.name)
    there = f"; there are: {', '.join(others)}" if others else ""
    return f"{path}: {'this is a folder' if file.is_dir() else 'no such file'}{there}"


def apply_recipe(config: ConfigDict, recipe: str) -> None:
    """Applies a recipe in place: `apply(config)` of a file in configs/recipes/, given by name, or of any FILE.py.

    Raises:
        ConfigError: the recipe does not exist, has no `apply`, or sets a key that configs/base.py lacks.
    """
    path = pathlib.Path(recipe)
    if path.suffix != ".py":
        found = importlib.util.find_spec("configs")
        folders = [pathlib.Path(place) / "recipes" for place in (found and found.submodule_search_locations) or ()]
        files = {p.stem.replace("_", "-"): p for folder in folders for p in sorted(folder.glob("[!_]*.py"))}
        if recipe not in files:
            known = f"; there are: {', '.join(files)}, or name a file.py" if files else "; name a file.py"
            raise ConfigError(f"--recipe={recipe}: no such recipe{nearest(recipe, files)}{known}")
        path = files[recipe]
    elif not path.is_file():
        raise ConfigError(f"--recipe={recipe}: no such file")
    _run_file(str(path), f"--recipe={recipe}", lambda module: module.apply(config))


def _run_file(path: str, flag: str, use: Callable[[Any], Any]) -> Any:
    """Runs a Python file and returns `use(module)`."""
    spec = importlib.util.spec_from_file_location(f"config_{pathlib.Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{flag}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return use(module)
    except Exception as error:
        raise ConfigError(f"{flag}: {type(error).__name__}: {_key_error(error)}") from None


def _key_error(error: Exception) -> str:
    return one_line(str(error).replace("\\n", " ").replace("\\", "").strip("'\""))


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies `--config.key=value` arguments; each value is parsed as the type of the key's default.

    Raises:
        ConfigError: a key is unknown (the message suggests the nearest one) or a value has the wrong type.
    """
    keys = config_keys(config)
    for argument in overrides:
        key = overridden(argument)
        if key not in keys:
            inside = [k for k in keys if k.startswith(key + ".")]
            hint = f"; it is a group: {', '.join(inside)}" if inside else nearest(key, keys)
            raise ConfigError(f"--config.{key}: there is no such key{hint}")
    if not overrides:
        return config
    try:
        return _read(config, overrides)
    except OVERRIDE_ERRORS as error:
        for argument in overrides:  # find the one that fails; a key may be given twice
            group = overridden(argument).partition(".")[0]
            try:
                _read(ConfigDict({group: config[group]}), [argument])
            except OVERRIDE_ERRORS:
                kind = type(get_key(config, overridden(argument)))
                known = KEYS.get(overridden(argument))
                right = known.expects if known and known.rule.many else KINDS.get(kind)
                raise ConfigError(f"{argument}: must be {right or f'of type {kind.__name__}'}") from None
        raise ConfigError(one_line(error)) from None


def _read(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    values, command = flags.FlagValues(), ["command", *map(_spelled, overrides)]
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
    values(command)
    return holder.value


def _spelled(argument: str) -> str:
    """Returns an override in the form that ml_collections parses.

    Former key names are replaced, strings are quoted, 1e3 and 1_000 become integers, and an empty list becomes ().
    """
    key, (_, equals, value) = overridden(argument), argument.partition("=")
    name, rule = f"--config.{key}", KEYS[key].rule if key in KEYS else None
    if equals and rule and rule.many and not value.strip(" ()[]"):
        return f"{name}=()"
    if equals and rule and rule.kind is int:
        entries = [_whole(entry) for entry in value.strip(" ()[]").rstrip(",").split(",")]
        if not rule.many:
            value = _whole(value)
        elif all(entry.lstrip("-").isdecimal() for entry in entries):  # other text stays as typed, for the error
            value = f"({','.join(entries)},)"
    if equals and rule and rule.many and rule.kind is str:
        try:
            ast.literal_eval(value)
        except OVERRIDE_ERRORS:  # without quotes, as usually typed: stem*,stage1*
            value = repr(tuple(part.strip() for part in value.split(",") if part.strip()))
    return f"{name}{equals}{value}"


def _whole(text: str) -> str:
    """Returns an integer in any notation as plain digits, 1e3 as 1000; any other text unchanged."""
    try:
        number = Decimal(text.strip())  # also parses 1_000, and is exact
    except InvalidOperation:
        return text
    whole = number.is_finite() and number.adjusted() < MOST_DIGITS and number == number.to_integral_value()
    return str(int(number)) if whole else text


def parse_options(text: str, key: str) -> dict[str, Any]:
    """Parses keyword arguments, "kernels=(7,), mfe_act='relu'", without evaluating code.

    Raises:
        ConfigError: the text is not a list of keyword arguments with literal values.
    """
    try:
        call = ast.parse(f"options({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError  # also for "a=1)(b=2", which parses as a call of a call
        names = [keyword.arg for keyword in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deeply
        raise ConfigError(f'{key}={text!r}: write keyword arguments, like "kernels=(7,), mfe_norm=True"') from None
    return {name: _hashable(value) for name, value in options.items() if name is not None}


def _hashable(value: Any) -> Any:
    """Returns the value with tuples in place of lists: modules are arguments of compiled functions."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def validate(config: ConfigDict) -> ConfigDict:
    """Checks everything that needs neither devices nor data; returns the configuration.

    Raises:
        ConfigError: a value is wrong; the message names the key, its value and what is allowed.
    """
    check_keys(config)
    check_together(config)
    model = build_model(config, num_classes=1)
    for key, size in (("data", config.data.image_size), ("evaluation", config.evaluation.image_size)):
        if size < model.stride and (size or key == "data"):
            raise ConfigError(
                f"{key}.image_size={size}: {config.model.name} divides height and width by {model.stride}; "
                f"give at least {model.stride}"
            )
    return config


def build_model(config: ConfigDict, num_classes: int, axis_name: str | None = None) -> Any:
    """Creates the network that `config.model` describes.

    Args:
        config: a complete configuration.
        num_classes: number of logits.
        axis_name: name of the mapped axis over which batch statistics are averaged; None: no averaging.

    Raises:
        ConfigError: the model, the attention or an option is unknown; the message lists the known ones.
    """
    import jax.numpy as jnp

    from hga_flax.attention import attention_names
    from hga_flax.models import create_model

    model = config.model
    options = parse_options(model.options, "model.options")
    attention_options = parse_options(model.attention_options, "model.attention_options")
    for key, given, fixed in (
        ("options", options, MODEL_ARGUMENTS),
        ("attention_options", attention_options, {"name"}),
    ):
        if clash := sorted(given.keys() & fixed):
            raise ConfigError(f"config.model.{key}: {clash[0]} is not an option; the run sets it")
    try:
        return create_model(
            model.name,
            attention=model.attention,
            attention_options=attention_options,
            num_classes=num_classes,
            dtype=jnp.dtype(model.dtype),
            axis_name=axis_name,
            **options,
        )
    except (ValueError, TypeError) as error:
        foreign = model.attention not in attention_names()
        hint = "; an attention of your own needs --import=MODULE" if foreign else ""
        raise ConfigError(f"config.model: {error}{hint}") from None


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON text, with the keys sorted within each group."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ConfigDict:
    """Parses the text of a workdir's config.json; returns the locked configuration.

    Raises:
        UserError: the text is not a configuration.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(tuples(inner) for inner in value) if isinstance(value, list) else value

    try:
        values = tuples(json.loads(text))
        for key in KEYS:  # not those of configs/base.py, which an installed package lacks
            *groups, name = key.split(".")
            inner = values
            for group in groups:
                inner = inner.get(group, {})
                if not isinstance(inner, dict):
                    raise TypeError(f"{group} is no group of keys")
            if isinstance(inner.get(name), dict):
                raise TypeError(f"{key} is a group of keys")
        for former, key in FORMER_NAMES.items():
            (group, name), new = former.split("."), key.split(".")[1]
            if isinstance(values.get(group), dict) and name in values[group]:
                values[group][new] = values[group].pop(name)
        return ConfigDict(values).lock()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"not a configuration: {one_line(error)}") from None


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns one "key: old -> new" for each key whose values differ."""
    keys = dict.fromkeys(config_keys(old) + config_keys(new))

    def value(config: ConfigDict, key: str) -> Any:
        try:
            return get_key(config, key)
        except (KeyError, AttributeError):
            return "(absent)"

    return [f"{k}: {value(old, k)} -> {value(new, k)}" for k in keys if value(old, k) != value(new, k)]
