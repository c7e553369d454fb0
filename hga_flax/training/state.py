"""Everything of a run that lives on the devices and goes into a checkpoint."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.errors
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hga_flax.data.streams import DROPOUT, PARAMETERS, stream
from hga_flax.errors import ConfigError, UserError, one_line
from hga_flax.processes.mesh import replicated
from hga_flax.training.metrics import TrainMetrics

# What a network raises for options that it cannot be built with.
NETWORK_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, flax.errors.FlaxError)


@flax.struct.dataclass
class TrainState:
    """The state of training after `step` steps.

    `metrics` are the running sums since the last logged line, so that a resumed run logs the same;
    `skipped` of the steps were not finite and changed nothing else.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    metrics: TrainMetrics
    skipped: jax.Array
    ema: ClassVar[Any] = None  # no part of the tree, nor of its checkpoints: see AveragedState

    def variables(self, weights: str | None = None) -> dict[str, Any]:
        """Returns {"params", "batch_stats"}: "ema", "raw", or None for the average where the run keeps one.

        Raises:
            UserError: "ema" of a run that keeps none.
        """
        if weights == "ema" and self.ema is None:
            raise UserError("weights=ema: this run keeps no average (training.ema_decay=0); use raw")
        raw = weights == "raw" or self.ema is None
        return {"params": self.params, "batch_stats": self.batch_stats} if raw else self.ema


@flax.struct.dataclass
class AveragedState(TrainState):
    """A state that also keeps `ema`, the moving average of {"params", "batch_stats"}."""

    ema: Any = None


def make_init(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, int, int], *, ema: bool = False
) -> Callable[[jax.Array], TrainState]:
    """Returns `init(key) -> TrainState`, to be traced by `abstract_state` or compiled by `create_state`.

    Args:
        model: the network.
        optimizer: of the run.
        image_shape: `(H, W, C)` of its images.
        ema: keep a moving average, which begins as the initial weights.
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
        # Copies: the step donates the state, and no buffer can be donated twice.
        average = {"params": params, "batch_stats": batch_stats}
        return AveragedState(**state, ema=jax.tree.map(jnp.copy, average)) if ema else TrainState(**state)

    return init


def abstract_state(init: Callable[[jax.Array], TrainState], mesh: Mesh) -> TrainState:
    """Returns the state's shapes, dtypes and placement, without computing it.

    Raises:
        ConfigError: the network refuses its options or the shape of its images.
    """
    try:
        shapes = jax.eval_shape(init, jax.random.key(0))
    except NETWORK_ERRORS as error:
        raise ConfigError(f"config.model cannot be built: {one_line(error)[:300]}") from None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)


def check_training(model: nn.Module, state: TrainState, image_shape: tuple[int, int, int]) -> None:
    """Traces the network as training calls it, for options that only training refuses.

    Raises:
        ConfigError: the network cannot be trained.
    """
    model = model.clone(axis_name=None)  # the axis is there inside shard_map alone
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    call = lambda variables, images, key: model.apply(
        variables, images, train=True, mutable=["batch_stats", "aux_logits"], rngs={"dropout": key}
    )
    try:
        jax.eval_shape(call, variables, images, jax.random.key(0))
    except NETWORK_ERRORS as error:
        raise ConfigError(f"config.model cannot be trained: {one_line(error)[:300]}") from None


def check_evaluation(model: nn.Module, state: TrainState, image_shape: tuple[int, int, int]) -> None:
    """Traces the network at the size of its evaluation, for parts that are made for the training's alone.

    Raises:
        ConfigError: the network cannot be evaluated at that size.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    call = lambda variables, images: model.apply(variables, images, train=False)
    try:
        jax.eval_shape(call, state.variables(), images)
    except NETWORK_ERRORS as error:
        raise ConfigError(
            f"evaluation.image_size={image_shape[0]}: this network cannot be evaluated at another size than it is "
            f"trained at: {one_line(error)[:200]}"
        ) from None


def create_state(init: Callable[[jax.Array], TrainState], seed: int, mesh: Mesh) -> TrainState:
    """Returns the initial state, a function of the seed, on every device of the mesh."""
    return jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(seed))
