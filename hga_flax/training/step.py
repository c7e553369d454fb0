"""The compiled training and evaluation steps, distributed over the devices with shard_map.

They use shard_map rather than jit with shardings, because for grouped convolutions XLA's partitioner gathers the
whole batch on every device (openxla/xla#47945). Each device processes its part of the batch; global values (the
loss, the batch statistics, the metrics) are reduced over the named axis.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from hga_flax.data.streams import AUGMENTATION, DROPOUT, ERASING, FLIP, MIXING, stream
from hga_flax.errors import NOT_AWAITED
from hga_flax.images.device_augmentation import (
    alternating_flip,
    augment,
    example_keys,
    mix,
    random_erasing,
)
from hga_flax.models.norm import frozen_statistics
from hga_flax.processes.mesh import DATA_AXIS
from hga_flax.training.ema import update_ema
from hga_flax.training.evaluation import EvalStep, apply_network, normalized
from hga_flax.training.metrics import LOSSES, ClassificationMetrics, TrainMetrics, batch_metrics, cross_entropy
from hga_flax.training.norm import global_norm
from hga_flax.training.parameters import hold_frozen
from hga_flax.training.state import TrainState

Batch = dict[str, jax.Array]
AUXILIARY_WEIGHT = 0.3  # per auxiliary head's loss (Szegedy et al., https://arxiv.org/abs/1409.4842, section 5)
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec(DATA_AXIS)


@flax.struct.dataclass
class StepReport:
    """What a step reports to the host: mean `loss` and gradient norm, float32 scalars replicated on every device."""

    loss: jax.Array
    gradient_norm: jax.Array


def prepare_images(batch: Batch, config: ConfigDict, root: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Augments and normalises the images of a training batch.

    Args:
        batch: `image` uint8 `[B, H, W, C]`; `label`, `index` and `epoch` int32 `[B]`.
        config: configuration of the run.
        root: key from which all random streams of the run derive.

    Returns:
        (images, other, share): images float32 `[B, H, W, C]`; if images are mixed, the label of the other image,
        int32 `[B]`, and the weight of the original label, float32 `[B]`; else the original label and None.
    """
    data, images, other, share = config.data, batch["image"], batch["label"], None
    keys = lambda name: example_keys(stream(root, name), batch["epoch"], batch["index"])
    if data.augmentation == "small":
        images = augment(
            images.astype("float32"),
            keys(AUGMENTATION),
            data.crop_padding,
            flip=data.flip and not data.alternating_flip,
            rotation_degrees=data.rotation_degrees,
        )
        if data.alternating_flip:
            images = alternating_flip(images, stream(root, FLIP), batch["epoch"], batch["index"])
    if data.random_erasing:
        erase = lambda key, image: random_erasing(key, image, data.random_erasing)
        images = jax.vmap(erase)(keys(ERASING), images.astype("float32"))
    if data.mixup or data.cutmix:
        images, other, share = mix(images.astype("float32"), other, keys(MIXING), data.mixup, data.cutmix)
    return normalized(images, data), other, share


class Gradient(NamedTuple):
    """Result of a batch, or of one of its accumulated parts.

    Attributes:
        grads: gradient of the mean loss, a tree like the parameters.
        batch_stats: updated batch statistics.
        mean_loss: mean over the global batch, including the auxiliary heads.
        logits: logits of this device's images, `[B, classes]`.
        loss: losses of this device's images, `[B]`, without the auxiliary heads.
    """

    grads: Any
    batch_stats: Any
    mean_loss: jax.Array
    logits: jax.Array
    loss: jax.Array


def batch_gradient(
    model: nn.Module,
    config: ConfigDict,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    root: jax.Array,
    dropout: jax.Array,
) -> Gradient:
    """Augments a batch and returns the gradient of its mean loss over all devices.

    `root` is the key of the run's random streams, `dropout` the key for this device and step.
    """
    images, other, share = prepare_images(batch, config, root)

    def target_loss(logits: jax.Array) -> jax.Array:
        criterion, smoothing = LOSSES[config.training.loss], config.training.label_smoothing
        own = criterion(logits, batch["label"], smoothing)
        # The loss is linear in the target: soft labels give the weighted mean over hard labels.
        return own if share is None else share * own + (1 - share) * criterion(logits, other, smoothing)

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Any]]:
        variables = {"params": hold_frozen(config, params), "batch_stats": batch_stats}
        with frozen_statistics(config.training.freeze_batch_stats):
            logits, updates = model.apply(
                variables, images, train=True, mutable=["batch_stats", "aux_logits"], rngs={"dropout": dropout}
            )
        loss = target_loss(logits)
        total = loss.mean()
        for auxiliary in jax.tree.leaves(updates.get("aux_logits", {})):
            total += AUXILIARY_WEIGHT * target_loss(auxiliary).mean()
        return lax.pmean(total, DATA_AXIS), (logits, loss, updates.get("batch_stats", {}))

    (mean_loss, (logits, loss, updated)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    if config.training.batch_norm_scope == "device":
        # What is frozen is left alone, because the mean of equal numbers may round.
        mean = lambda new, old: new if new is old else lax.pmean(new, DATA_AXIS)
        updated = jax.tree.map(mean, updated, batch_stats)
    return Gradient(grads, updated, mean_loss, logits, loss)


def accumulated_gradient(
    model: nn.Module,
    config: ConfigDict,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    root: jax.Array,
    dropout: jax.Array,
    *,
    unroll: bool = False,
) -> Gradient:
    """Computes the same as `batch_gradient` from `training.accumulation_steps` parts of this device's batch in turn.

    It needs the memory of one part and returns the gradient of the whole batch, except that each part is normalised
    by its own batch statistics, like a smaller batch, and updates the running statistics once. With frozen or no
    batch statistics the gradient equals that of the whole batch up to rounding (and dropout, which is drawn per part).
    `unroll` writes out the parts instead of looping over them: on CPUs XLA's convolutions inside a loop are ten
    times slower (jax 0.10.2).
    """
    count = config.training.accumulation_steps
    if count == 1:
        return batch_gradient(model, config, params, batch_stats, batch, root, dropout)
    # The parts take turns: part 0 has images 0, count, 2 * count, ... of the global batch, or such pairs where images
    # are mixed in pairs. However many devices there are, each part has the same images and batch statistics.
    unit = 2 if config.data.mixup or config.data.cutmix else 1
    deal = lambda x: x.reshape(-1, count, unit, *x.shape[1:]).swapaxes(0, 1).reshape(count, -1, *x.shape[1:])
    collect = lambda x: x.reshape(count, -1, unit, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
    parts = jax.tree.map(deal, batch)
    # Each device sums its own gradients, so that they are all-reduced once instead of once per part.
    params = jax.tree.map(lambda x: lax.pcast(x, DATA_AXIS, to="varying"), params)

    def add(sums: tuple[Any, Any, jax.Array], part: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
        grads, batch_stats, loss = sums
        key = jax.random.fold_in(dropout, part[0])
        new = batch_gradient(model, config, params, batch_stats, part[1], root, key)
        sums = jax.tree.map(jnp.add, grads, new.grads), new.batch_stats, loss + new.mean_loss
        return sums, (new.logits, new.loss)

    zero = jax.tree.map(jnp.zeros_like, params), batch_stats, jnp.zeros(())
    (grads, batch_stats, mean_loss), each = lax.scan(add, zero, (jnp.arange(count), parts), unroll=unroll)
    grads = jax.tree.map(lambda g: lax.psum(g, DATA_AXIS) / count, grads)
    logits, loss = jax.tree.map(collect, each)
    return Gradient(grads, batch_stats, mean_loss / count, logits, loss)


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """Returns the jitted training step, (state, batch) -> (state, StepReport), which donates the state.

    The batch holds `image` uint8 `[B, H, W, C]`, and `label`, `index` and `epoch` int32 `[B]`, split over
    the mesh. The gradient is that of the mean loss over the global batch.
    """
    unroll = mesh.devices.flat[0].platform == "cpu"

    def step(state: TrainState, batch: Batch, seed: jax.Array) -> tuple[TrainState, StepReport]:
        root = jax.random.key(seed)
        # The key derives from step and device, so no random state is kept between steps.
        dropout = jax.random.fold_in(stream(root, DROPOUT), state.step)
        dropout = jax.random.fold_in(dropout, lax.axis_index(DATA_AXIS))
        # The parameters are replicated, so shard_map sums their gradient over the mesh.
        grads, batch_stats, mean_loss, logits, loss = accumulated_gradient(
            model, config, state.params, state.batch_stats, batch, root, dropout, unroll=unroll
        )
        norm = global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = batch_metrics(logits, batch["label"], loss, None, DATA_AXIS)
        metrics = TrainMetrics(gradient_norm=clu_metrics.Average.from_model_output(norm), **vars(metrics))
        after = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            metrics=state.metrics.merge(metrics),
        )
        if config.training.ema_decay:
            made = state.step - state.skipped  # the schedule and the optimizer count no skipped steps either
            ema = update_ema(state.ema, after.variables("raw"), config.training.ema_decay, made)
            after = dataclasses.replace(after, ema=ema)
        if config.training.skip_nonfinite:
            finite = jnp.isfinite(mean_loss) & jnp.isfinite(norm)
            skipped = dataclasses.replace(state, step=after.step, skipped=state.skipped + 1)
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, skipped)
        return after, StepReport(mean_loss, norm)

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(REPLICATED, SPLIT, REPLICATED), out_specs=REPLICATED)
    seeks = jax.config.jax_debug_nans or jax.config.jax_debug_infs
    program = _seek_nans(sharded) if seeks else jax.jit(sharded, donate_argnums=0)
    return Seeded(program, config.seed)


class Seeded:
    """Calls a program of (..., seed) with the run's seed; so do its lowered and compiled forms.

    The seed is an argument of the compiled program, so that all runs of a study can share one program.

    Args:
        program: result of `jax.jit`, or of its `lower` and `compile`.
        seed: seed of the run.
    """

    def __init__(self, program: Any, seed: int):
        self._program, self._seed = program, np.int32(seed)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the program with these arguments and the seed."""
        return self._program(*arguments, self._seed)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """Traces the program for these arguments or their shapes, for example to lower it for another platform."""
        return self._program.trace(*arguments, self._seed)

    def lower(self, *arguments: Any) -> "Seeded":
        """Lowers the program for these arguments or their shapes."""
        return Seeded(self._program.lower(*arguments, self._seed), self._seed)

    def compile(self, *arguments: Any, **options: Any) -> "Seeded":
        """Compiles the lowered program."""
        return Seeded(self._program.compile(*arguments, **options), self._seed)

    def __getattr__(self, name: str) -> Any:
        """Forwards to the program, for example cost_analysis, memory_analysis and as_text."""
        return getattr(self._program, name)


def compile_step(step: Callable, state: TrainState, batch: Batch) -> Callable[[], tuple[Callable, bool]]:
    """Lowers a training step for a state and a batch, or their shapes.

    Returns a function that returns the compiled step, and whether it was in the compilation cache.

    CPUs compile in another thread while the caller goes on, because XLA at first compiles on one core. Other devices
    compile when the function is called, because XLA for GPUs times kernels. All processes must call it together.
    When debugging JAX (JAX_DEBUG_NANS, JAX_DEBUG_INFS, JAX_DISABLE_JIT) the function returns the step itself, because
    JAX does not debug a program compiled ahead of time.
    """
    if jax.config.jax_debug_nans or jax.config.jax_debug_infs or jax.config.jax_disable_jit:
        return lambda: (step, False)
    compile_lowered = functools.partial(_compile, step.lower(state, batch))
    if state.step.sharding.mesh.devices.flat[0].platform != "cpu":
        return compile_lowered
    thread = ThreadPoolExecutor(1, NOT_AWAITED)  # a signal ends the command at once, but a compilation cannot be ended
    compiling = thread.submit(compile_lowered)
    thread.shutdown(wait=False)
    return compiling.result


def _compile(lowered: jax.stages.Lowered) -> tuple[Callable, bool]:
    hits, own = [], threading.get_ident()

    def listen(event: str, **more: object) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == own:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        return lowered.compile(), bool(hits)
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _seek_nans(step: Callable[[TrainState, Batch], tuple[TrainState, StepReport]]) -> Callable:
    """Returns the compiled step for JAX_DEBUG_NANS=1 and JAX_DEBUG_INFS=1; it repeats non-finite steps eagerly.

    Run op by op, JAX raises a FloatingPointError at the operation that produced the first NaN or infinity.
    By itself JAX (0.10.2) checks only the results of the first call of a compiled function.
    """
    compiled = jax.jit(step)

    def seek(state: TrainState, batch: Batch, seed: jax.Array) -> tuple[TrainState, StepReport]:
        after, report = compiled(state, batch, seed)
        if not (jnp.isfinite(report.loss) & jnp.isfinite(report.gradient_norm)):
            with jax.disable_jit():
                step(state, batch, seed)
        return after, report

    seek.trace, seek.lower = compiled.trace, compiled.lower  # type: ignore[attr-defined]
    return seek


def make_eval_step(model: nn.Module, config: ConfigDict, mesh: Mesh) -> EvalStep:
    """Returns the jitted evaluation step: (params, batch_stats, sums so far, batch) -> sums.

    The batch holds `image`, `label` and `mask`, which is False for padding.
    """

    def step(params: Any, batch_stats: Any, sums: ClassificationMetrics, batch: Batch) -> ClassificationMetrics:
        variables = {"params": params, "batch_stats": batch_stats}
        logits = apply_network(model, config.data, variables, batch["image"])
        loss = cross_entropy(logits, batch["label"])
        return sums.merge(batch_metrics(logits, batch["label"], loss, batch["mask"], DATA_AXIS))

    specs = (REPLICATED, REPLICATED, REPLICATED, SPLIT)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=REPLICATED))
