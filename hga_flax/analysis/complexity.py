"""Counts what a network holds and computes, by walking its traced program (jaxpr).

Nothing is computed and no memory is taken: the network is traced with abstract arrays, and the
counts are those of the program that JAX would compile, through every nested call.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from hga_flax.models.norm import BatchNorm

_BATCH_NORM = "hga_flax batch norm"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Operations of a program.

    Attributes:
        conv_fc_macs: multiply-accumulates of convolutions and matrix products. Taps on the zero
            padding count, as every published count of these networks has it. The products of
            shift pooling with its constant 0/1 matrices are computed like any other and count.
        bn_elements: elements of BatchNorm's outputs.
        pool_reads: elements that average poolings add up (an element counts once per pooling).
        pool_outputs: elements that average poolings make. Max pooling has no arithmetic to count.
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
    """Size of a network, and its cost for one image in inference.

    Attributes:
        params: values of the collection `params`.
        batch_stats: values of the collection `batch_stats` (BatchNorm's running mean and variance).
        conv_fc_macs, bn_elements, pool_reads, pool_outputs: see `Counts`.
    """

    params: int
    batch_stats: int
    conv_fc_macs: int
    bn_elements: int
    pool_reads: int
    pool_outputs: int

    @property
    def gflops(self) -> float:
        """Conv + fc multiply-accumulates and two operations per BatchNorm element, in 1e9.

        The paper's "FLOPs (G)", found by its five plain networks: the convention of
        pytorch-OpCounter (thop) as of 2020, in which one multiply-accumulate is one FLOP.
        """
        return (self.conv_fc_macs + 2 * self.bn_elements) / 1e9

    @property
    def thop_total(self) -> int:
        """The whole sum of thop: `gflops` and one operation per average-pooling read and output."""
        return self.conv_fc_macs + 2 * self.bn_elements + self.pool_reads + self.pool_outputs


def complexity(model: nn.Module, image_shape: Sequence[int] = (224, 224, 3)) -> Complexity:
    """Counts a network, called as `model.apply(variables, images, train=False)`.

    Args:
        model: a network of `create_model`, or any Flax module that is called with (images, train).
        image_shape: (height, width, channels) of one image.

    Raises:
        ValueError: the program holds a loop whose length only its data decide, or a hand-written
            kernel, which cannot be counted.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda key, images: model.init(key, images, train=False), key, images)
    counts = count_operations(lambda variables, images: model.apply(variables, images, train=False), variables, images)
    return Complexity(
        params=_size(variables.get("params", {})),
        batch_stats=_size(variables.get("batch_stats", {})),
        **dataclasses.asdict(counts),
    )


def count_operations(function: Callable[..., Any], *arguments: Any) -> Counts:
    """Counts the operations of `function(*arguments)`; the arguments may be `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: see `complexity`.
    """
    return _count(_trace(function, *arguments))


def operations_by_scope(function: Callable[..., Any], *arguments: Any) -> dict[tuple[str, ...], Counts]:
    """Counts the operations of `function(*arguments)` by where they happen.

    The scopes are JAX's: of a Flax network its class and the names of its modules, such as ("ResNet",
    "stage1_block1", "attention", ...). What a nested program (jit, scan, ...) does counts where it is called.

    Raises:
        ValueError: see `complexity`.
    """
    scopes: dict[tuple[str, ...], Counts] = {}
    with flax.config.temp_flip_flag("profile", True):  # Flax's modules open scopes, whatever the user set
        program = _trace(function, *arguments)
    for equation in program.eqns:
        scope = tuple(str(equation.source_info.name_stack).split("/"))
        scopes[scope] = scopes.get(scope, Counts()) + _count_equation(equation)
    return scopes


def _trace(function: Callable[..., Any], *arguments: Any) -> core.Jaxpr:
    with nn.intercept_methods(_mark_batch_norm):
        # A function of its own: JAX would otherwise reuse a trace made without the marks.
        return jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments).jaxpr


def _values(counts: Counts) -> tuple[int, ...]:
    return tuple(getattr(counts, field.name) for field in dataclasses.fields(counts))


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _mark_batch_norm(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Leaves a mark in the program after every BatchNorm, which is plain arithmetic otherwise."""
    output = call(*args, **kwargs)
    if isinstance(context.module, nn.BatchNorm | BatchNorm) and context.method_name == "__call__":
        return checkpoint_name(output, _BATCH_NORM)
    return output


def _count(program: core.Jaxpr) -> Counts:
    total = Counts()
    for equation in program.eqns:
        total = total + _count_equation(equation)
    return total


def _count_equation(equation: core.JaxprEqn) -> Counts:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return Counts(conv_fc_macs=_outputs(equation) * math.prod(kernel) // outputs)
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
        # Pooling by `mean` reduces height and width at once; sums over one axis are of other kinds.
        return Counts(pool_reads=math.prod(equation.invars[0].aval.shape), pool_outputs=_outputs(equation))
    return _count_nested(equation)


def _count_nested(equation: core.JaxprEqn) -> Counts:
    """Counts the programs that an equation calls: jit, remat, custom derivatives, scan, cond, ..."""
    name = equation.primitive.name
    inner = [_count(program) for program in _nested(equation.params.values())]
    if name == "scan":
        return inner[0] * equation.params["length"]
    if name == "cond":
        return max(inner, key=lambda counts: counts.conv_fc_macs)  # the branch that costs most
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
