"""Converts a JAX function to an ONNX graph (https://onnx.ai/onnx/operators/), operation by operation.

It supports the operations of inference networks; any other operation raises an error that names it. (jax2onnx supports
more, but up to 0.17.1 needs an older Orbax than training does.) Values are kept as small as broadcasting allows.
Feature maps stay `[B, H, W, C]` except around convolutions and poolings, where ONNX requires channels first; ONNX
Runtime merges these transpositions.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from hga_flax.errors import UserError

OPSET, IR_VERSION = 18, 8  # those of ONNX 1.13 (2022), so that runtimes of that age can read the file
UNARY = {
    **{"exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs"},
    **{"sign": "Sign", "erf": "Erf", "stop_gradient": "Identity", "copy": "Identity"},
}
BINARY = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow"},
    **{"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
}
REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the graph.

    Attributes:
        name: name in the graph.
        shape: numbers and symbolic dimensions; an axis of length 1 may stand for a longer one (broadcasting).
        array: array of a constant.
        convolution: the convolution node that produced the value, if a bias can still be added to it.
        channel_axis: axis of the convolution's channels.
    """

    name: str
    shape: tuple[Any, ...]
    array: np.ndarray | None = None
    convolution: onnx.NodeProto | None = None
    channel_axis: int = 0


def to_onnx(
    function: Callable[[jax.Array], dict[str, jax.Array]], images: jax.ShapeDtypeStruct, metadata: dict[str, str]
) -> onnx.ModelProto:
    """Returns a function as an ONNX model.

    Args:
        function: maps one array, named "images" in the graph, to named arrays.
        images: shape, with a symbolic first dimension, and dtype.
        metadata: metadata to store in the file.

    Raises:
        UserError: the function contains an unsupported operation.
    """
    program, results = jax.make_jaxpr(function, return_shape=True)(images)
    graph = _Graph(program, images)
    outputs = []
    for name, value in zip(sorted(results), graph.results, strict=True):  # JAX sorts the keys too
        graph.nodes.append(helper.make_node("Identity", [value.name], [name]))
        outputs.append(_declared(name, results[name]))
    read = {name for node in graph.nodes for name in node.input}
    constants = [tensor for tensor in graph.initializers if tensor.name in read]
    proto = helper.make_graph(graph.nodes, "network", [_declared("images", images)], outputs, constants)
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="hga_flax"
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model


def _declared(name: str, spec: Any) -> onnx.ValueInfoProto:
    shape = [n if isinstance(n, int) else str(n) for n in spec.shape]
    return helper.make_tensor_value_info(name, _onnx_type(spec.dtype), shape)


def _onnx_type(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


class _Graph:
    """Converts a program: collects nodes and constants in order; `results` are the program's outputs."""

    def __init__(self, program: core.ClosedJaxpr, images: jax.ShapeDtypeStruct):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._batch = images.shape[0]
        jaxpr = program.jaxpr
        self._uses = Counter(v for e in jaxpr.eqns for v in e.invars if isinstance(v, core.Var))
        self._uses.update(v for v in jaxpr.outvars if isinstance(v, core.Var))
        values = {var: self.constant(const) for var, const in zip(jaxpr.constvars, program.consts, strict=True)}
        values[jaxpr.invars[0]] = Value("images", images.shape)
        read = lambda var: self.constant(var.val) if isinstance(var, core.Literal) else values[var]
        for eqn in jaxpr.eqns:
            made = self._convert(eqn, [read(var) for var in eqn.invars])
            values.update(zip(eqn.outvars, made if isinstance(made, list) else [made], strict=True))
        self.results = [self.whole(read(var), var.aval.shape) for var in jaxpr.outvars]

    # Building blocks.

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """Adds a constant."""
        array = np.ascontiguousarray(array, dtype).reshape(np.shape(array))
        name = f"constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return Value(name, array.shape, array)

    def add(self, operator: str, inputs: Sequence[Value], shape: Sequence[Any], **attributes: Any) -> Value:
        """Adds a node with one result."""
        name = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, [value.name for value in inputs], [name], name, **attributes))
        return Value(name, tuple(shape))

    def integers(self, numbers: Sequence[int]) -> Value:
        return self.constant(list(numbers), np.int64)

    def reshaped(self, x: Value, shape: Sequence[Any]) -> Value:
        if tuple(shape) == x.shape:
            return x
        if x.array is not None:
            return self.constant(x.array.reshape(shape))
        lengths = [n if isinstance(n, int) else -1 for n in shape]
        if lengths.count(-1) > 1:
            raise UserError(f"a reshape to {shape} cannot be written in ONNX; export --format=stablehlo")
        return self.add("Reshape", [x, self.integers(lengths)], shape)

    def transposed(self, x: Value, order: Sequence[int]) -> Value:
        """Returns x transposed: axis order[i] moves to position i."""
        order = list(order)
        if order == sorted(order):
            return x
        if x.array is not None:
            return self.constant(x.array.transpose(order))
        return self.add("Transpose", [x], [x.shape[i] for i in order], perm=order)

    def whole(self, x: Value, shape: Sequence[Any]) -> Value:
        """Returns x broadcast to its full shape."""
        if x.shape == tuple(shape):
            return x
        if not x.shape:
            x = self.reshaped(x, [1] * len(shape))
        lengths = [1 if a == b else b for a, b in zip(x.shape, shape, strict=True)]
        if all(isinstance(n, int) for n in lengths):
            return self.add("Expand", [x, self.integers(lengths)], shape)
        if any(not isinstance(n, int) and n != self._batch for n in lengths):
            raise UserError(f"a broadcast to {shape} cannot be written in ONNX; export --format=stablehlo")
        # The batch size: "Shape" of the images, restricted to the first axis.
        batch = self.add("Shape", [Value("images", ())], (1,), start=0, end=1)
        parts = [self.integers([n]) if isinstance(n, int) else batch for n in lengths]
        return self.add("Expand", [x, self.add("Concat", parts, (len(parts),), axis=0)], shape)

    # The operations.

    def _convert(self, eqn: core.JaxprEqn, inputs: list[Value]) -> Value | list[Value]:
        name, aval = eqn.primitive.name, eqn.outvars[0].aval
        if name in BINARY:
            return self._binary(eqn, *inputs)
        if name in UNARY:
            return self.add(UNARY[name], inputs, inputs[0].shape)
        if name == "convert_element_type":
            return self.add("Cast", inputs, inputs[0].shape, to=_onnx_type(aval.dtype))
        if name == "rsqrt":
            return self.add("Reciprocal", [self.add("Sqrt", inputs, inputs[0].shape)], inputs[0].shape)
        if name == "square":
            return self.add("Mul", inputs * 2, inputs[0].shape)
        if name == "integer_pow":
            power = self.constant(eqn.params["y"], aval.dtype)
            return self.add("Pow", [*inputs, power], inputs[0].shape)
        if name == "broadcast_in_dim":
            shape = [1] * aval.ndim
            for axis, length in zip(eqn.params["broadcast_dimensions"], inputs[0].shape, strict=True):
                shape[axis] = length
            return self.reshaped(inputs[0], shape)
        inputs = [self.whole(value, var.aval.shape) for value, var in zip(inputs, eqn.invars, strict=True)]
        if name in REDUCTIONS:
            return self.add(REDUCTIONS[name], [*inputs, self.integers(eqn.params["axes"])], aval.shape, keepdims=0)
        if name in ("reshape", "squeeze", "expand_dims"):
            return self.reshaped(inputs[0], aval.shape)
        handler = getattr(self, f"_{name}", None)
        if handler is None:
            raise UserError(f"the operation '{name}' is not supported by --format=onnx; use --format=stablehlo")
        return handler(inputs, aval.shape, **eqn.params)

    def _binary(self, eqn: core.JaxprEqn, left: Value, right: Value) -> Value:
        name = eqn.primitive.name
        node = left.convolution
        if name == "add" and node is not None and self._uses[eqn.invars[0]] == 1 and right.array is not None:
            channels = left.shape[left.channel_axis]
            if right.array.size == right.shape[left.channel_axis] == channels and len(node.input) == 2:
                node.input.append(self.constant(right.array.reshape(channels)).name)
                return Value(left.name, left.shape)
        if name == "max" and right.array is not None and right.array.size == 1 and right.array.item() == 0:
            return self.add("Relu", [left], left.shape)
        shapes = [(1,) * (eqn.outvars[0].aval.ndim - len(v.shape)) + v.shape for v in (left, right)]
        shape = [b if a == 1 else a for a, b in zip(*shapes, strict=True)]
        return self.add(BINARY[name], [left, right], shape)

    def _select_n(self, inputs, shape) -> Value:
        which, *cases = inputs
        if len(cases) != 2:
            raise UserError("a choice among more than two cannot be written in ONNX; use --format=stablehlo")
        return self.add("Where", [which, cases[1], cases[0]], shape)

    def _transpose(self, inputs, shape, *, permutation) -> Value:
        return self.transposed(inputs[0], permutation)

    def _concatenate(self, inputs, shape, *, dimension) -> Value:
        return self.add("Concat", inputs, shape, axis=dimension)

    def _split(self, inputs, shape, *, sizes, axis) -> list[Value]:
        x, names = inputs[0], [f"split{len(self.nodes)}_{i}" for i in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [x.name, self.integers(sizes).name], names, names[0], axis=axis))
        shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
        return [Value(name, shape) for name, shape in zip(names, shapes, strict=True)]

    def _stack(self, inputs, shape, *, axis=0, **_) -> Value:
        parts = [self.reshaped(x, [*x.shape[:axis], 1, *x.shape[axis:]]) for x in inputs]
        return self.add("Concat", parts, shape, axis=axis)

    def _slice(self, inputs, shape, *, start_indices, limit_indices, strides) -> Value:
        x = inputs[0]
        strides = strides or [1] * len(shape)
        cuts = [
            (axis, start, stop, stride)
            for axis, (start, stop, stride) in enumerate(zip(start_indices, limit_indices, strides, strict=True))
            if (start, stop, stride) != (0, x.shape[axis], 1)
        ]
        if not cuts:
            return x
        axes, starts, stops, steps = (self.integers(numbers) for numbers in zip(*cuts, strict=True))
        return self.add("Slice", [x, starts, stops, axes, steps], shape)

    def _pad(self, inputs, shape, *, padding_config) -> Value:
        if any(inside for _, _, inside in padding_config):
            raise UserError("padding between elements cannot be written in ONNX; use --format=stablehlo")
        edges = [low for low, _, _ in padding_config] + [high for _, high, _ in padding_config]
        return self.add("Pad", [inputs[0], self.integers(edges), inputs[1]], shape)

    def _gather(self, inputs, shape, *, dimension_numbers, slice_sizes, **_) -> Value:
        """Converts a gather with constant indices: `x[:, 1:5]`, `x[:, ::2, ::2]`, `x[:, rows]`, for any batch size."""
        x, places, axes = inputs[0], inputs[1].array, dimension_numbers.start_index_map
        collapsed, kept = dimension_numbers.collapsed_slice_dims, dimension_numbers.offset_dims
        known = places is not None and not dimension_numbers.operand_batching_dims
        if known and not collapsed and kept == tuple(range(len(shape))):
            starts = [0] * len(shape)
            for axis, start in zip(axes, places, strict=True):
                starts[axis] = int(start)
            limits = [n if start == 0 else start + n for start, n in zip(starts, slice_sizes, strict=True)]
            return self._slice([x], shape, start_indices=starts, limit_indices=limits, strides=None)
        grid = [places[..., i] for i in range(len(axes))] if known else []
        if len(axes) > 1:  # supported if the indices form a grid: one line of indices per axis
            lines = [np.moveaxis(along, i, 0).reshape(along.shape[i], -1)[:, 0] for i, along in enumerate(grid)]
            known = known and all((a == b).all() for a, b in zip(grid, np.meshgrid(*lines, indexing="ij"), strict=True))
            grid = lines
        rank = len(shape) - len(kept)
        whole = all(n == x.shape[i] or i in axes for i, n in enumerate(slice_sizes))
        ordered = list(kept) == [i for i in range(len(shape)) if not axes[0] <= i < axes[0] + rank]
        if not (known and collapsed == axes and whole and ordered and list(axes) == sorted(axes)):
            raise UserError("a gather that is not a slice cannot be written in ONNX; use --format=stablehlo")
        for axis, line in zip(axes, grid, strict=True):
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = self.add("Gather", [x, self.constant(line, np.int64)], (*before, *line.shape, *after), axis=axis)
        return x

    def _conv_general_dilated(
        self, inputs, shape, *, dimension_numbers, window_strides, padding, lhs_dilation, rhs_dilation, **params
    ) -> Value:
        if any(n != 1 for n in lhs_dilation) or params["batch_group_count"] != 1:
            raise UserError("a transposed convolution cannot be written in ONNX here; use --format=stablehlo")
        x = self.transposed(inputs[0], dimension_numbers.lhs_spec)
        weights = self.transposed(inputs[1], dimension_numbers.rhs_spec)
        out = dimension_numbers.out_spec
        y = self.add(
            "Conv",
            [x, weights],
            [shape[i] for i in out],
            strides=list(window_strides),
            pads=[low for low, _ in padding] + [high for _, high in padding],
            dilations=list(rhs_dilation),
            group=params["feature_group_count"],
        )
        node = self.nodes[-1]
        return dataclasses.replace(self.transposed(y, np.argsort(out).tolist()), convolution=node, channel_axis=out[1])

    def _dot_general(self, inputs, shape, *, dimension_numbers, **_) -> Value:
        left, right = inputs
        (contracted, batch) = dimension_numbers
        if contracted == ((len(left.shape) - 1,), (0,)) and batch == ((), ()) and len(right.shape) == 2:
            return self.add("MatMul", [left, right], shape)
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        names: list[dict[int, str]] = [{}, {}]
        for pairs in (batch, contracted):
            for i, j in zip(*pairs, strict=True):
                names[0][i] = names[1][j] = next(letters)
        shared = [names[0][i] for i in batch[0]]
        free = [
            [names[side].setdefault(i, next(letters)) for i in range(len(x.shape)) if i not in names[side]]
            for side, x in enumerate(inputs)
        ]
        terms = ["".join(names[side][i] for i in range(len(x.shape))) for side, x in enumerate(inputs)]
        return self.add("Einsum", inputs, shape, equation=f"{','.join(terms)}->{''.join(shared + free[0] + free[1])}")

    def _reduce_window_max(self, inputs, shape, **params) -> Value:
        return self._pooled("MaxPool", inputs[0], shape, **params)

    def _reduce_window_sum(self, inputs, shape, **params) -> Value:
        y = self._pooled("AveragePool", inputs[0], shape, **params, count_include_pad=1)
        return self.add("Mul", [y, self.constant(np.prod(params["window_dimensions"]), np.float32)], shape)

    def _pooled(
        self, operator, x, shape, *, window_dimensions, window_strides, padding, base_dilation, window_dilation, **more
    ) -> Value:
        """Pools over the two middle axes of `[B, H, W, C]`."""
        apart = any(n != 1 for n in (*base_dilation, *window_dilation))
        if apart or len(x.shape) != 4 or (window_dimensions[0], window_dimensions[3]) != (1, 1):
            raise UserError("a pooling that is not over height and width cannot be written in ONNX here")
        first, last = [0, 3, 1, 2], [0, 2, 3, 1]
        y = self.add(
            operator,
            [self.transposed(x, first)],
            [shape[i] for i in first],
            kernel_shape=list(window_dimensions[1:3]),
            strides=list(window_strides[1:3]),
            pads=[low for low, _ in padding[1:3]] + [high for _, high in padding[1:3]],
            **more,
        )
        return self.transposed(y, last)
