"""Counts the parameters and operations of a network by walking its traced program (jaxpr).

The network is traced with abstract arrays, so nothing is computed and no memory allocated. The counts
are those of the program that JAX would compile, including every nested call.
"""

import contextvars
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from hga_flax.models.norm import BatchNorm

_BATCH_NORM = "hga_flax batch norm"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Operations of a program.

    Attributes:
        conv_fc_macs: multiply-accumulates of convolutions and matrix products. Taps on the zero
            padding count, as in all published counts of these networks. The products of shift
            pooling with its constant 0/1 matrices are computed like any other, so they count.
        bn_elements: output elements of BatchNorms.
        pool_reads: input elements that average poolings add up, counted once per window.
        pool_outputs: output elements of average poolings. Max pooling has no arithmetic to count.
    """

    conv_fc_macs: int = 0
    bn_elements: int = 0
    pool_reads: int = 0
    pool_outputs: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: int) -> "Counts":
        return Counts(*(a * times for a in _values(self)))


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Size of a network, and its inference cost for one image.

    Attributes:
        params: number of values in the collection `params`.
        batch_stats: number of values in the collection `batch_stats` (BatchNorm's running mean and variance).
        conv_fc_macs, bn_elements, pool_reads, pool_outputs: see `Counts`.
    """

    params: int
    batch_stats: int
    conv_fc_macs: int
    bn_elements: int
    pool_reads: int
    pool_outputs: int

    def __add__(self, other: "Complexity") -> "Complexity":
        return Complexity(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def gflops(self) -> float:
        """Conv + FC multiply-accumulates plus two operations per BatchNorm element, in 1e9.

        This is the paper's "FLOPs (G)", inferred from its five plain networks: the convention of
        pytorch-OpCounter (thop) as of 2020, where one multiply-accumulate is one FLOP.
        """
        return (self.conv_fc_macs + 2 * self.bn_elements) / 1e9

    @property
    def thop_total(self) -> int:
        """The total that thop reports: the operations of `gflops` plus one per average-pooling read and output."""
        return self.conv_fc_macs + 2 * self.bn_elements + self.pool_reads + self.pool_outputs


def complexity(model: nn.Module, image_shape: Sequence[int] = (224, 224, 3)) -> Complexity:
    """Counts the parameters and operations of `model.apply(variables, images, train=False)`.

    Args:
        model: a network from `create_model`, or any Flax module that is called with (images, train).
        image_shape: (height, width, channels) of one image.

    Raises:
        ValueError: the program has a loop of data-dependent length or a hand-written kernel, which
            cannot be counted.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    whole = _package(model) != "models"
    try:
        counted, _ = _measure(model, (images,), {"train": False}, whole=whole)
    except _NotOurs:
        counted, _ = _measure(model, (images,), {"train": False}, whole=True)
    return counted


class _NotOurs(Exception):
    """A module from outside this project, which may do something else in each place of the network."""


def count_operations(function: Callable[..., Any], *arguments: Any) -> Counts:
    """Counts the operations of `function(*arguments)`; arguments may be `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: see `complexity`.
    """
    return _count(_trace(function, *arguments)[0])


def operations_by_scope(function: Callable[..., Any], *arguments: Any) -> dict[tuple[str, ...], Counts]:
    """Counts the operations of `function(*arguments)` by scope.

    The scopes are JAX's: for a Flax network its class and the names of its modules, such as ("ResNet",
    "stage1_block1", "attention", ...). The operations of a nested program (jit, scan, ...) count where it is called.

    Raises:
        ValueError: see `complexity`.
    """
    scopes: dict[tuple[str, ...], Counts] = {}
    with flax.config.temp_flip_flag("profile", True):  # make Flax's modules open scopes, whatever the user set
        program, _ = _trace(function, *arguments)
    for equation in program.eqns:
        scope = tuple(str(equation.source_info.name_stack).split("/"))
        scopes[scope] = scopes.get(scope, Counts()) + _count_equation(equation)
    return scopes


def _trace(function: Callable[..., Any], *arguments: Any) -> tuple[core.Jaxpr, Any]:
    """Returns the program of a function and the shapes of its results."""
    with nn.intercept_methods(_mark_batch_norm):
        # A new lambda, because JAX would otherwise reuse a trace made without the marks.
        program, shapes = jax.make_jaxpr(lambda *arguments: function(*arguments), return_shape=True)(*arguments)
    return program.jaxpr, shapes


def _measure(model: nn.Module, args: tuple, kwargs: dict[str, Any], *, whole: bool = False) -> tuple[Complexity, Any]:
    """Counts `model(*args, **kwargs)` and returns the counts and the shapes of its results.

    A deep network repeats a few blocks many times, and tracing them is nearly all of the work. So the blocks of
    our networks, and the norms and attentions in them, are traced separately, once per process for all equal ones
    (each time if a function of somebody else's is among their fields),
    and replaced by zeros of the right shape in the surrounding trace. This requires children that own their
    parameters and affect the parent only by their output, which holds for everything in hga_flax/models.
    With `whole` nothing is replaced; otherwise a module from outside this project raises `_NotOurs`.
    """
    arrays, rebuild = _split_arrays(args, kwargs)
    this = object()
    parts: dict[tuple[str, ...], Complexity] = {}  # by path, so repeated calls add no parameters
    calls: list[Complexity] = []

    def skip_block(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if whole:
            return call(*args, **kwargs)
        if type(module).__module__.split(".")[0] not in ("hga_flax", "flax"):
            raise _NotOurs
        ours = _package(model) == "models" and _package(module) in ("models", "attention")
        child = context.method_name == "__call__" and len(module.path) == 1
        if not (ours and child and _measuring.get() is this):  # a block's own trace runs through this interceptor too
            return call(*args, **kwargs)
        counted, shapes = _measure_once(module, args, kwargs)
        parts[module.path] = counted
        calls.append(counted)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def init(key: jax.Array, *arrays: jax.Array) -> Any:
        args, kwargs = rebuild(arrays)
        return model.init(key, *args, **kwargs)

    def apply(variables: Any, *arrays: jax.Array) -> Any:
        args, kwargs = rebuild(arrays)
        return model.apply(variables, *args, **kwargs)

    outer = _measuring.set(this)
    try:
        with nn.intercept_methods(skip_block):
            variables = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), *arrays)
            calls.clear()  # do not count the trace of the initialisation
            program, shapes = _trace(apply, variables, *arrays)
    finally:
        _measuring.reset(outer)
    own = _count(program)
    # What a part's `setup` created is in both traces.
    outside = lambda kind: {key: leaf for key, leaf in variables.get(kind, {}).items() if (key,) not in parts}
    total = Complexity(
        params=_size(outside("params")) + sum(part.params for part in parts.values()),
        batch_stats=_size(outside("batch_stats")) + sum(part.batch_stats for part in parts.values()),
        **dataclasses.asdict(own),
    )
    return sum((dataclasses.replace(call, params=0, batch_stats=0) for call in calls), total), shapes


def _package(module: nn.Module) -> str:
    """Returns the subpackage of hga_flax that defines a module's class, or ""."""
    names = type(module).__module__.split(".")
    return names[1] if names[0] == "hga_flax" and len(names) > 2 else ""


_MEASURED: dict[Any, tuple[Complexity, Any]] = {}
_measuring: contextvars.ContextVar[Any] = contextvars.ContextVar("the network that is being traced", default=None)


def _measure_once(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Complexity, Any]:
    arrays, _ = _split_arrays(args, kwargs)
    static = jax.tree.map(lambda leaf: None if isinstance(leaf, jax.Array) else leaf, (args, kwargs))
    fields = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    try:
        key = (
            type(module),
            tuple((name, _hashable(getattr(module, name))) for name in fields),
            tuple((array.shape, array.dtype) for array in arrays),
            str(static),
        )
        hash(key)
    except TypeError:  # a field is not hashable: trace the block each time
        return _measure(module.clone(parent=None, name=None), args, kwargs)
    if key not in _MEASURED:
        _MEASURED[key] = _measure(module.clone(parent=None, name=None), args, kwargs)
    return _MEASURED[key]


def _hashable(value: Any) -> Any:
    """Returns a hashable key that is equal for equal fields of two modules; partials are compared by their contents."""
    if isinstance(value, functools.partial):
        return "partial", _hashable(value.func), _hashable(value.args), _hashable(value.keywords)
    if isinstance(value, Mapping):
        return tuple((name, _hashable(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_hashable(entry) for entry in value)
    if callable(value) and not isinstance(value, type):
        home = (getattr(value, "__module__", None) or "").partition(".")[0]
        if home not in ("hga_flax", "jax", "flax", "numpy") or isinstance(value, types.MethodType):
            raise TypeError(f"what {value!r} returns may depend on more than its arguments")
    return type(value), value  # the type, since 1 == True


def _split_arrays(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], Callable[..., tuple[tuple, dict]]]:
    """Returns the shapes of the arrays among the arguments, and a function that inserts arrays in their place."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)]

    def rebuild(arrays: Sequence[jax.Array]) -> tuple[tuple, dict]:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return jax.tree.unflatten(structure, filled)

    return [jax.ShapeDtypeStruct(leaves[place].shape, leaves[place].dtype) for place in places], rebuild


def _values(counts: Counts | Complexity) -> tuple[int, ...]:
    return tuple(getattr(counts, field.name) for field in dataclasses.fields(counts))


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _mark_batch_norm(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Marks the output of every BatchNorm in the program, where it would be indistinguishable from other arithmetic."""
    output = call(*args, **kwargs)
    if isinstance(context.module, nn.BatchNorm | BatchNorm) and context.method_name == "__call__":
        return checkpoint_name(output, _BATCH_NORM)
    return output


def _count(program: core.Jaxpr) -> Counts:
    return sum(map(_count_equation, program.eqns), Counts())


def _count_equation(equation: core.JaxprEqn) -> Counts:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        taps = math.prod(kernel) // outputs * _outputs(equation)
        return Counts(conv_fc_macs=taps // math.prod(params["lhs_dilation"]))  # the others are inserted zeros
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return Counts(conv_fc_macs=_outputs(equation) * math.prod(left[axis] for axis in contracted))
    if name == "name" and params["name"] == _BATCH_NORM:
        return Counts(bn_elements=_outputs(equation))
    if name == "reduce_window_sum":
        window = math.prod(params["window_dimensions"])
        return Counts(pool_reads=_outputs(equation) * window, pool_outputs=_outputs(equation))
    if name == "reduce_sum" and len(params["axes"]) > 1:
        # Pooling by `mean` reduces height and width at once; a sum over a single axis is not pooling.
        return Counts(pool_reads=math.prod(equation.invars[0].aval.shape), pool_outputs=_outputs(equation))
    return _count_nested(equation)


def _count_nested(equation: core.JaxprEqn) -> Counts:
    """Counts the programs that an equation calls: jit, remat, custom derivatives, scan, cond, ..."""
    name = equation.primitive.name
    inner = [_count(program) for program in _nested(equation.params.values())]
    if name == "scan":
        return inner[0] * equation.params["length"]
    if name == "cond":
        return max(inner, key=lambda counts: counts.conv_fc_macs)  # the most expensive branch
    total = sum(inner, Counts())
    if name == "pallas_call" or (name == "while" and total != Counts()):
        raise ValueError(f"cannot count the operations of a '{name}': its program does not say how often it runs")
    return total


def _nested(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _nested(value)


def _outputs(equation: core.JaxprEqn) -> int:
    return math.prod(equation.outvars[0].aval.shape)
