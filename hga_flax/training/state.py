"""The training state: everything that lives on the devices and is saved in a checkpoint."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import flax.errors
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.sharding import Mesh

from hga_flax.data.streams import DROPOUT, PARAMETERS, stream
from hga_flax.errors import ConfigError, UserError, one_line
from hga_flax.processes.mesh import replicate, replicated
from hga_flax.training.metrics import TrainMetrics

# Used to compute the initial state on CPUs.
UNOPTIMISED = {"xla_backend_optimization_level": 0}  # for programs that run only a few times
BY_NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt}
DRAWS = {  # by JAX's names for them in a program; limits are (lowest, highest)
    "_normal": lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
    "_truncated_normal": lambda key, shape, dtype, *limits: jax.random.truncated_normal(key, *limits, shape, dtype),
    "_uniform": lambda key, shape, dtype, *limits: jax.random.uniform(key, shape, dtype, *limits),
}
LENGTHS = (4096, 65536)  # of compiled draws; longer ones are powers of two

# Errors that networks raise for options that do not work.
NETWORK_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, flax.errors.FlaxError)


@flax.struct.dataclass
class TrainState:
    """The state of training after `step` steps.

    Attributes:
        step: number of steps, int32 scalar.
        params: parameters of the network.
        batch_stats: batch statistics of the network.
        opt_state: state of the optimizer.
        metrics: running sums since the last logged line, saved so that a resumed run logs the same values.
        skipped: number of steps that were not finite, and therefore changed nothing but `step` and this count.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    metrics: TrainMetrics
    skipped: jax.Array
    ema: ClassVar[Any] = None  # not part of the tree or its checkpoints: see AveragedState

    def variables(self, weights: str | None = None) -> dict[str, Any]:
        """Returns {"params", "batch_stats"}, "ema" or "raw"; None means the moving average if the run keeps one.

        Raises:
            UserError: "ema" for a run without a moving average, or neither.
        """
        if weights not in (None, "ema", "raw"):
            raise UserError(f"weights={weights}: must be ema, raw or None")
        if weights == "ema" and self.ema is None:
            raise UserError("weights=ema: this run keeps no average (training.ema_decay=0); use raw")
        raw = weights == "raw" or self.ema is None
        return {"params": self.params, "batch_stats": self.batch_stats} if raw else self.ema


@flax.struct.dataclass
class AveragedState(TrainState):
    """A training state with `ema`, the moving average of {"params", "batch_stats"}."""

    ema: Any = None


def make_init(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, int, int], *, ema: bool = False
) -> Callable[[jax.Array], TrainState]:
    """Returns `init(key) -> TrainState`, to be traced by `abstract_state` or compiled by `create_state`.

    Args:
        model: the network.
        optimizer: the optimizer.
        image_shape: `(H, W, C)` of training images.
        ema: keep a moving average, which starts at the initial weights.
    """

    def init(key: jax.Array) -> TrainState:
        keys = {"params": stream(key, PARAMETERS), "dropout": stream(key, DROPOUT)}
        variables = model.init(keys, jnp.zeros((1, *image_shape), jnp.float32), train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        state: dict[str, Any] = dict(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            metrics=TrainMetrics.empty(),
            skipped=jnp.zeros((), jnp.int32),
        )
        # Copied, because the step donates the state, and a buffer cannot be donated twice.
        average = {"params": params, "batch_stats": batch_stats}
        return AveragedState(**state, ema=jax.tree.map(jnp.copy, average)) if ema else TrainState(**state)

    return init


@contextlib.contextmanager
def calling_network(problem: str) -> Iterator[None]:
    """Turns the errors of a network that is called in this context into a ConfigError that begins with `problem`."""
    try:
        yield
    except NETWORK_ERRORS as error:
        raise ConfigError(f"{problem}: {one_line(error)[:300]}") from None


def abstract_state(init: Callable[[jax.Array], TrainState], mesh: Mesh) -> TrainState:
    """Returns the state's shapes, dtypes and shardings without computing it.

    Raises:
        ConfigError: the network rejects its options or the image shape.
    """
    with calling_network("config.model cannot be built"):
        shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)


def check_training(model: nn.Module, state: TrainState, image_shape: tuple[int, int, int]) -> None:
    """Traces the network in training mode, to find options that fail only there.

    Raises:
        ConfigError: the network cannot be trained.
    """
    model = model.clone(axis_name=None)  # the axis exists only inside shard_map
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    call = lambda variables, images, key: model.apply(
        variables, images, train=True, mutable=["batch_stats", "aux_logits"], rngs={"dropout": key}
    )
    with calling_network("config.model cannot be trained"):
        jax.eval_shape(call, variables, images, jax.random.key(0))


def check_evaluation(model: nn.Module, state: TrainState, image_shape: tuple[int, int, int]) -> None:
    """Traces the network at the evaluation image size, to find parts that work only at the training size.

    Raises:
        ConfigError: the network cannot be evaluated at that size.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    call = lambda variables, images: model.apply(variables, images, train=False)
    key = f"evaluation.image_size={image_shape[0]}"
    with calling_network(f"{key}: this network can be evaluated only at the size it is trained at"):
        jax.eval_shape(call, state.variables(), images)


def create_state(init: Callable[[jax.Array], TrainState], seed: int, mesh: Mesh) -> TrainState:
    """Returns the initial state for a seed, replicated on every device of the mesh.

    On CPUs it is computed operation by operation, because compiling hundreds of draws of random numbers as one program
    takes longer than the first step (ResNet-20: 22 s).
    """
    if mesh.devices.flat[0].platform == "cpu":
        return replicate(_evaluate(init, jax.random.key(seed)), mesh)
    return jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(seed))


def _evaluate(init: Callable[[jax.Array], TrainState], key: jax.Array) -> TrainState:
    """Returns `init(key)`, computing only the operations that its result needs, and compiling few of them."""
    program, shapes = jax.make_jaxpr(init, return_shape=True)(key)
    needed, operations = _variables(program.jaxpr.outvars), []
    for equation in reversed(program.jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            operations.append(equation)
            needed |= _variables(equation.invars)

    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True)) | {program.jaxpr.invars[0]: key}
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    for equation in reversed(operations):
        values |= zip(equation.outvars, _results(equation, list(map(read, equation.invars))), strict=True)
    return jax.tree.unflatten(jax.tree.structure(shapes), [read(atom) for atom in program.jaxpr.outvars])


def _results(equation: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
    """Returns the results of one operation: by NumPy where it rounds identically, drawn, or compiled."""
    name, out = equation.primitive.name, equation.outvars[0].aval
    if name == "broadcast_in_dim" and jnp.ndim(inputs[0]) == 0 and isinstance(out.dtype, np.dtype):  # false for keys
        return [np.broadcast_to(np.asarray(inputs[0], out.dtype), out.shape)]
    if name in BY_NUMPY and out.dtype == np.float32:
        return [BY_NUMPY[name](*(np.asarray(value, np.float32) for value in inputs))]
    if name == "erf_inv":  # jax 0.12 keeps it outside the draw
        count = math.prod(out.shape)
        padded = np.pad(np.ravel(inputs[0]), (0, _length(count) - count))
        flat = _compiled(equation.primitive, (), (equation.invars[0].aval.update(shape=padded.shape),))(padded)[0]
        return [np.asarray(flat)[:count].reshape(out.shape)]
    if equation.params.get("name") in DRAWS and (flat := _drawn(equation, inputs, math.prod(out.shape))) is not None:
        return [flat.reshape(out.shape)]
    operation = equation.primitive, tuple(equation.params.items()), tuple(atom.aval for atom in equation.invars)
    try:
        run = _compiled(*operation)
    except TypeError:  # a parameter that is not hashable
        run = _compiled.__wrapped__(*operation)
    return run(*inputs)


def _drawn(equation: core.JaxprEqn, inputs: list[Any], count: int) -> np.ndarray | None:
    """Returns the first `count` numbers of a longer draw, which are the same; None where that is not certain.

    A network with dozens of shapes then needs programs of only a few lengths.
    """
    is_key = lambda value: jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)
    if any(map(jnp.ndim, inputs)) or not any(map(is_key, inputs[:1])):
        return None  # keys of several draws, limits for each number, or another function of that name
    key, *limits = inputs
    if not (jax.config.jax_threefry_partitionable and str(jax.random.key_impl(key)) == "threefry2x32"):
        return None
    name, out = equation.params["name"], equation.outvars[0].aval
    if str(equation.params["jaxpr"]) != _program(name, out.shape, out.dtype, tuple(v.aval for v in equation.invars)):
        return None  # another function of that name
    return np.asarray(_draw(name, _length(count), out.dtype)(key, *limits))[:count]


@functools.cache
def _program(name: str, shape: tuple[int, ...], dtype: Any, inputs: tuple) -> str:
    """Returns JAX's program of a draw as text."""
    draw = lambda key, *limits: DRAWS[name](key, shape, dtype, *limits)
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False)) for x in inputs]
    try:
        equations = jax.make_jaxpr(draw)(*arguments).eqns
    except (TypeError, ValueError):  # another function of that name takes other arguments, or returns another type
        return ""
    return next((str(own.params["jaxpr"]) for own in equations if own.params.get("name") == name), "")


def _length(count: int) -> int:
    return next((length for length in LENGTHS if length >= count), 1 << (count - 1).bit_length())


@functools.cache
def _draw(name: str, length: int, dtype: Any) -> Callable[..., jax.Array]:
    draw = lambda key, *limits: DRAWS[name](key, (length,), dtype, *limits)
    return jax.jit(draw, compiler_options=UNOPTIMISED)


@functools.cache
def _compiled(primitive: core.Primitive, params: tuple, inputs: tuple) -> Callable[..., Sequence[jax.Array]]:
    """Compiles one operation without optimisation, since it runs once; equal operations are compiled once."""

    def run(*arrays: jax.Array) -> Sequence[jax.Array]:
        inner = dict(params).get("call_jaxpr")
        if isinstance(inner, core.ClosedJaxpr):  # a function with a custom derivative, which is not needed here
            return core.jaxpr_as_fun(inner)(*arrays)
        outputs = primitive.bind(*arrays, **dict(params))
        return outputs if primitive.multiple_results else [outputs]

    return jax.jit(run).lower(*inputs).compile(compiler_options=UNOPTIMISED)


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}
