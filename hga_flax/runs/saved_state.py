"""Matches the arrays of a checkpoint by name with those of the state being restored.

Names leave out the nesting of an optimizer's transformations, so that checkpoints of older versions with another
nesting can be read: those that kept frozen parameters apart, or stored no momentum when it was 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hga_flax.errors import UserError

OPTIMIZER = "opt_state"
# Per-parameter optimizer state; zero before the first gradient, hence zero for a parameter that was frozen.
MOMENTS = ("trace", "mu", "nu")
NESTING = ("inner_states", "trained", "inner_state")
# Configuration keys that decide which arrays a state has besides the network's.
STATE_KEYS = ("optimizer.name", "training.ema_decay")


def array_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf from its path in a state or in a checkpoint's metadata."""
    first, *rest = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if first == OPTIMIZER:
        while rest and (rest[0].isdecimal() or rest[0] in NESTING):
            rest.pop(0)
    return "/".join([first, *rest])


def named_arrays(tree: Any) -> dict[str, Any]:
    """Returns all arrays by name; repeated names are numbered from the second on, such as "count.2"."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = array_name(path)
        if name in found:
            name = next(other for n in range(2, 100) if (other := f"{name}.{n}") not in found)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            found[name] = leaf
    return found


def _facts(tree: Any) -> dict[str, str]:
    """Returns the shape and dtype of every array, by name."""
    return {name: f"{tuple(leaf.shape)} {leaf.dtype}" for name, leaf in named_arrays(tree).items()}


def _begins_at_zero(name: str, saved: dict[str, str]) -> bool:
    """Returns whether an array missing from a checkpoint is a moment that its optimizer has not needed so far."""
    group, _, rest = name.partition("/")
    moment = rest.partition("/")[0]
    if group != OPTIMIZER or moment not in MOMENTS:
        return False
    kinds = {other.split("/")[1] for other in saved if other.startswith(f"{OPTIMIZER}/")}
    return moment in kinds or (moment == "trace" and kinds == {"count"})  # SGD without momentum


def check_same_arrays(where: str, saved: Any, like: Any, changes: list[str]) -> None:
    """Checks that a checkpoint holds the arrays of a state.

    Args:
        where: name of the checkpoint in messages.
        saved: tree of the checkpoint's array metadata.
        like: the state.
        changes: differences from the configuration that it was saved with ("key: old -> new").

    Raises:
        UserError: names, shapes or dtypes differ; the message names the configuration key responsible.
    """
    there, here = _facts(saved), _facts(like)
    differ = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    differ = [name for name in differ if name in there or not _begins_at_zero(name, there)]
    if not differ:
        return
    model = [name for name in differ if name.split("/")[0] in ("params", "batch_stats")]
    name, other = (model[0], "model") if model else (differ[0], "optimizer")
    if name.startswith("ema/"):
        other = "training.ema_decay"
    keys = [change for change in changes if change.split(": ")[0] in STATE_KEYS]
    if keys and not model:
        raise UserError(
            f"the checkpoint {where} holds the state of another optimizer or average; changed since: "
            f"{', '.join(keys)}; undo that, or choose another --workdir"
        )
    raise UserError(
        f"the checkpoint {where} belongs to another {other}: {name} is {there.get(name, 'absent')} there and "
        f"{here.get(name, 'absent')} here; choose another --workdir, or the {other} it was trained with"
    )


def placed(saved: Any, like: Any) -> Any:
    """Returns a checkpoint's arrays as a tree of `jax.ShapeDtypeStruct`, with the shardings of the state `like`."""
    wanted = named_arrays(like)
    names = iter(named_arrays(saved))

    def place(leaf: Any) -> Any:
        facts = wanted[next(names)]
        return jax.ShapeDtypeStruct(facts.shape, facts.dtype, sharding=facts.sharding)

    return jax.tree.map(place, saved)


def filled(like: Any, restored: Any) -> Any:
    """Returns the state `like` filled with the restored arrays; moments that were not saved start at zero."""
    found = named_arrays(restored)
    names = iter(named_arrays(like))

    def take(leaf: Any) -> Any:
        name = next(names)
        return found[name] if name in found else _zeros(leaf)

    return jax.tree.map(take, like)


def _zeros(leaf: Any) -> jax.Array:
    part: Callable[[Any], np.ndarray] = lambda index: np.zeros(leaf.shape, leaf.dtype)[index]
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
