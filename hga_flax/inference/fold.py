"""Optimises a network's function for inference: folds constants, and folds norms into convolutions.

It works on the function's jaxpr, so it does not depend on the network or on names. A convolution or matrix product
with constant weights, followed by multiplications and additions of constants per output channel (as in BatchNorm at
inference), becomes one operation with new weights and a bias. An affine map after anything else, such as the first
norm of a pre-activation block or the image normalisation, becomes one multiplication and one addition. The results are
equal up to rounding.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint"}
# Operations in which each element of the result depends on one element of each operand.
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "max", "min", "pow", "neg", "sign", "abs", "exp", "log", "tanh", "logistic"),
    *("sqrt", "rsqrt", "square", "integer_pow", "convert_element_type", "stop_gradient", "copy", "select_n"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
}


@dataclasses.dataclass(frozen=True)
class Constant:
    """A known value; the array broadcasts to the value's shape."""

    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or matrix product of `x` with constant weights.

    Attributes:
        weights: the constant weights.
        weights_axis: axis of the output channels in the weights.
        channel_axis: axis of the channels in the result.
        compute: computes the result from weights.
    """

    weights: np.ndarray
    weights_axis: int
    channel_axis: int
    compute: Callable[[np.ndarray], jax.Array]


class Affine:
    """The value source * scale + offset, computed lazily and only once.

    Args:
        source: an array or a product.
        scale: factor, broadcasts to the result.
        offset: summand, broadcasts to the result.
    """

    def __init__(self, source: "jax.Array | Product", scale: np.ndarray, offset: np.ndarray):
        self.source, self.scale, self.offset = source, scale, offset
        self._array: jax.Array | None = None

    def array(self) -> jax.Array:
        """Returns the computed value."""
        if self._array is None:
            if isinstance(self.source, Product):
                shape = [1] * self.source.weights.ndim
                shape[self.source.weights_axis] = -1
                y = self.source.compute(self.source.weights * self.scale.reshape(shape))
            else:
                y = self.source if (self.scale == 1).all() else self.source * self.scale
            self._array = y if (self.offset == 0).all() else y + self.offset
        return self._array

    def then(self, scale: Any, offset: Any) -> "Affine":
        """Returns self * scale + offset, as one affine map unless they vary within a channel of a product."""
        if isinstance(self.source, Product):
            axis = self.source.channel_axis
            if any(np.delete(np.shape(c), axis).max(initial=1) > 1 for c in (scale, offset) if np.ndim(c)):
                return Affine(self.array(), *_identity(self.scale)).then(scale, offset)
        return Affine(self.source, self.scale * scale, self.offset * scale + offset)


Value = Constant | Affine | jax.Array


def fold(function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> Callable[..., Any]:
    """Returns an equivalent function, optimised as described in the module docstring.

    Args:
        function: function of arrays, with its weights as constants.
        *arguments: shapes (symbolic dimensions allowed) and dtypes of the arrays.
    """
    traced, tree = jax.make_jaxpr(function, return_shape=True)(*arguments)
    structure = jax.tree.structure(tree)

    def folded(*arrays: jax.Array) -> Any:
        values = _run(traced.jaxpr, traced.consts, arrays)
        outputs = [_array(v, var.aval) for v, var in zip(values, traced.jaxpr.outvars, strict=True)]
        return jax.tree.unflatten(structure, outputs)

    return folded


def _run(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    """Evaluates a program on values, some of which are constants."""
    uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, core.Var))
    uses.update(v for v in jaxpr.outvars if isinstance(v, core.Var))
    values: dict[core.Var, Value] = {}

    def write(var: core.Var, value: Value) -> None:
        # Compute values that are used twice: otherwise a product before two affine maps would be computed in each.
        values[var] = value.array() if isinstance(value, Affine) and uses[var] > 1 else value

    def read(var: core.Var | core.Literal) -> Value:
        return Constant(np.asarray(var.val)) if isinstance(var, core.Literal) else values[var]

    for var, const in zip(jaxpr.constvars, consts, strict=True):
        write(var, Constant(np.asarray(const)))
    for var, argument in zip(jaxpr.invars, arguments, strict=True):
        write(var, argument)
    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if eqn.primitive.name in CALLS:
            inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
            inner, inner_consts = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
            results = _run(inner, inner_consts, inputs)
        else:
            results = _evaluate(eqn, inputs)
        for var, result in zip(eqn.outvars, results, strict=True):
            write(var, result)
    return [read(var) for var in jaxpr.outvars]


def _evaluate(eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Returns the results of one operation: as constants, as an affine map, or as computed arrays."""
    if all(isinstance(value, Constant) for value in inputs):
        known = _constants(eqn, [value.array for value in inputs])
        if known is not None:
            return known
    affine = _affine(eqn, inputs)
    if affine is not None:
        return [affine]
    arrays = [_array(value, var.aval) for value, var in zip(inputs, eqn.invars, strict=True)]
    return _bind(eqn, arrays)


def _bind(eqn: core.JaxprEqn, arrays: Sequence[Any]) -> list[Any]:
    results = eqn.primitive.bind(*arrays, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def _constants(eqn: core.JaxprEqn, arrays: list[np.ndarray]) -> list[Constant] | None:
    """Computes an operation on constants, unbroadcast where possible; returns None if its size is unknown."""
    name = eqn.primitive.name
    if name == "dim_as_value":  # the value of a symbolic dimension
        return None
    if name == "broadcast_in_dim" and len(arrays) == 1:
        shape = [1] * len(eqn.params["shape"])
        for axis, length in zip(eqn.params["broadcast_dimensions"], arrays[0].shape, strict=True):
            shape[axis] = length
        return [Constant(arrays[0].reshape(shape))]
    if name in ELEMENTWISE:
        arrays = np.broadcast_arrays(*arrays)
    elif all(isinstance(n, int) for var in (*eqn.invars, *eqn.outvars) for n in var.aval.shape):
        arrays = [np.broadcast_to(a, var.aval.shape) for a, var in zip(arrays, eqn.invars, strict=True)]
    else:
        return None
    with jax.ensure_compile_time_eval():
        return [Constant(np.asarray(result)) for result in _bind(eqn, [jnp.asarray(a) for a in arrays])]


def _affine(eqn: core.JaxprEqn, inputs: list[Value]) -> Affine | None:
    """Returns the result of a product with constant weights, or of an affine operation with a constant; else None."""
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    if name in ("conv_general_dilated", "dot_general"):
        product = _product(eqn, inputs)
        return product and Affine(product, *_identity(aval))
    if name not in ("add", "sub", "mul", "div", "neg") or not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    if name == "neg":
        return _as_affine(inputs[0], aval).then(-1, 0)
    left, right = inputs
    if isinstance(right, Constant) and not isinstance(left, Constant):
        c, x = _ranked(right, aval), _as_affine(left, eqn.invars[0].aval)
        return {"add": lambda: x.then(1, c), "sub": lambda: x.then(1, -c), "mul": lambda: x.then(c, 0)}.get(
            name, lambda: x.then(1 / c, 0)
        )()
    if isinstance(left, Constant) and not isinstance(right, Constant) and name != "div":
        c, x = _ranked(left, aval), _as_affine(right, eqn.invars[1].aval)
        return {"add": lambda: x.then(1, c), "sub": lambda: x.then(-1, c), "mul": lambda: x.then(c, 0)}[name]()
    return None


def _product(eqn: core.JaxprEqn, inputs: list[Value]) -> Product | None:
    left, right = inputs
    if eqn.primitive.name == "conv_general_dilated":
        if not isinstance(right, Constant) or isinstance(left, Constant):
            return None
        numbers = eqn.params["dimension_numbers"]
        axis, channel_axis = numbers.rhs_spec[0], numbers.out_spec[1]
    else:
        ((_, contracted), (batch, _)) = eqn.params["dimension_numbers"]
        if isinstance(left, Constant) or not isinstance(right, Constant) or batch:
            return None
        free = set(range(eqn.invars[1].aval.ndim)) - set(contracted)
        if len(free) != 1:
            return None
        axis, channel_axis = free.pop(), eqn.outvars[0].aval.ndim - 1
    x = _array(left, eqn.invars[0].aval)
    weights = np.broadcast_to(right.array, eqn.invars[1].aval.shape)
    return Product(weights, axis, channel_axis, lambda weights: _bind(eqn, [x, weights])[0])


def _identity(like: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scale 1 and the offset 0 with the rank and dtype of an array or abstract value."""
    shape = [1] * like.ndim
    return np.ones(shape, like.dtype), np.zeros(shape, like.dtype)


def _as_affine(value: Affine | jax.Array, aval: Any) -> Affine:
    return value if isinstance(value, Affine) else Affine(value, *_identity(aval))


def _ranked(constant: Constant, aval: Any) -> np.ndarray:
    """Returns a constant with the rank and dtype of the result; jaxprs also combine arrays with scalars."""
    array = constant.array
    return (array if array.ndim else array.reshape([1] * aval.ndim)).astype(aval.dtype)


def _array(value: Value, aval: Any) -> Any:
    """Returns a value as an array of its full shape."""
    if isinstance(value, Affine):
        return value.array()
    if isinstance(value, Constant):
        return value.array if value.array.shape == aval.shape else jnp.broadcast_to(value.array, aval.shape)
    return value
