"""Selects parameters by pattern: those that are frozen, and those with their own learning rate.

A parameter's name is its path, `stage1_block1/conv1/kernel`. A pattern is a file pattern (`*`, `?`, `[12]`; `*`
also matches "/") and includes everything below its matches: `stem_norm` selects `stem_norm/scale` and
`stem_norm/bias`, `*/attention` every attention. The prefix `params/`, as in a run's parameters.txt, is optional.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hga_flax.config.checks import learning_rate_factors
from hga_flax.errors import ConfigError


def parameter_name(path: Iterable[Any]) -> str:
    """Returns the name of a leaf, given its path in a tree of dictionaries."""
    return "/".join(entry.key for entry in path)


def matches(pattern: str, name: str) -> bool:
    """Returns True if the pattern matches the parameter or a module that contains it."""
    pattern = pattern.removeprefix("params/")
    return any(fnmatch.fnmatchcase(above, pattern) for above in _upwards(name))


def _upwards(name: str) -> list[str]:
    """Returns all prefixes of a path: "a", "a/b", "a/b/c" for "a/b/c"."""
    return [name[: cut.start()] for cut in re.finditer("/", name)] + [name]


def _map(function: Callable[[str, Any], Any], params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, leaf: function(parameter_name(path), leaf), params)


def _is_frozen(config: ConfigDict, name: str) -> bool:
    return any(matches(pattern, name) for pattern in config.optimizer.freeze)


def _factor(factors: dict[str, float], name: str) -> float:
    """Returns the factor of the first pattern that matches the parameter, or 1."""
    return next((factor for pattern, factor in factors.items() if matches(pattern, name)), 1.0)


def hold_frozen(config: ConfigDict, params: Any) -> Any:
    """Stops the gradient of frozen parameters, so that it need not be computed."""
    if not config.optimizer.freeze:
        return params
    return _map(lambda name, p: jax.lax.stop_gradient(p) if _is_frozen(config, name) else p, params)


def by_parameter(config: ConfigDict, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps an optimizer: frozen parameters get no update, others a scaled learning rate; the state is unchanged.

    A factor scales the whole update. This is equivalent to another learning rate, both for SGD with its coupled
    weight decay and for AdamW and LAMB with their decoupled one. The update of a frozen
    parameter would be weight decay only, which is neither applied nor accumulated as momentum.
    """
    factors = learning_rate_factors(config)
    if not factors and not config.optimizer.freeze:
        return optimizer

    def scale(name: str, update: jax.Array) -> jax.Array:
        return jnp.zeros_like(update) if _is_frozen(config, name) else update * _factor(factors, name)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Zero values avoid weight decay, zero gradients avoid momentum.
        still = lambda tree: _map(lambda name, x: jnp.zeros_like(x) if _is_frozen(config, name) else x, tree)
        updates, state = optimizer.update(still(gradient), state, still(params))
        return _map(scale, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def check_patterns(config: ConfigDict, params: Any) -> None:
    """Checks that every pattern matches a parameter, and that some parameters are left to train.

    Raises:
        ConfigError: they do not; the message names the key, the pattern and the nearest paths.
    """
    names = _names(params)
    for key, patterns in (
        ("freeze", config.optimizer.freeze),
        ("learning_rate_factors", learning_rate_factors(config)),
    ):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                raise ConfigError(f"optimizer.{key}: no parameter's path matches '{pattern}'{_nearest(pattern, names)}")
    if all(_is_frozen(config, name) for name in names):
        raise ConfigError(f"optimizer.freeze={config.optimizer.freeze}: leaves nothing to train")


def _nearest(pattern: str, names: dict[str, int]) -> str:
    places = list(dict.fromkeys(above for name in names for above in _upwards(name)))
    plain = re.sub(r"\[(.).*?\]|[*?]", r"\1", pattern.removeprefix("params/"))
    close = difflib.get_close_matches(plain, places, n=3, cutoff=0.4) or [p for p in places if "/" not in p]
    return f"; the nearest: {', '.join(close[:8])}"


def _names(params: Any) -> dict[str, int]:
    """Returns the size of every parameter, by name."""
    return {parameter_name(path): leaf.size for path, leaf in jax.tree.leaves_with_path(params)}


def describe_groups(config: ConfigDict, params: Any) -> list[tuple[str, str]]:
    """Returns (name, value) rows about frozen parameters and learning-rate factors; [] if there are none."""
    sizes, rows = _names(params), []
    if config.optimizer.freeze:
        held = [name for name in sizes if _is_frozen(config, name)]
        rows.append(
            (
                "frozen",
                f"{sum(sizes[name] for name in held):,} of {sum(sizes.values()):,} parameters, {len(held)} of "
                f"{len(sizes)} arrays: {', '.join(config.optimizer.freeze)}",
            )
        )
    factors = learning_rate_factors(config)
    if factors:
        free = [name for name in sizes if not _is_frozen(config, name)]
        owner = {name: next((p for p in factors if matches(p, name)), None) for name in free}
        counts = {pattern: sum(sizes[name] for name in free if owner[name] == pattern) for pattern in factors}
        shown = ", ".join(f"{pattern} x {factors[pattern]:g} ({counts[pattern]:,} parameters)" for pattern in factors)
        rows.append(("rates", shown))
    return rows
