"""`train.py --dry-run`: describes a run without creating its parameters, reading images or writing a workdir.

Everything is traced with abstract arrays. The training step is lowered, and compiled only if that is quick or
requested; a compiled step that is short is also timed on zeros. Estimates are marked as such.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hga_flax.counting.parts import model_parts, parts_table
from hga_flax.data.sources import DatasetInfo, dataset_info
from hga_flax.errors import check_writable
from hga_flax.platforms import programs_for
from hga_flax.processes.settings import configure_process
from hga_flax.runs import workdir as files
from hga_flax.runs.checkpoints import Checkpoints
from hga_flax.runs.console import Console, duration
from hga_flax.runs.local_copy import find
from hga_flax.runs.manifest import UnreadableCheckpoint
from hga_flax.runs.progress import check_same_size, complete
from hga_flax.storage.buckets import is_remote
from hga_flax.training.experiment import Experiment, Plan, Prepared, create_experiment, describe, prepare
from hga_flax.training.initial_weights import fit_weights
from hga_flax.training.optimizer import decay_steps, warmup_steps
from hga_flax.training.state import TrainState
from hga_flax.training.step import make_train_step
from hga_flax.training.weights_source import check_source

QUICK = 150  # largest number of parameter arrays compiled by default: takes seconds (ResNet-50: minutes)
SHORT = 0.5  # a compiled step is timed if its estimate is below this many seconds
DECAYS_SHOWN = 8
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a training step on each device.

    Attributes:
        flops: floating-point operations as counted by XLA.
        memory: bytes by purpose; their sum is the memory estimate.
        compiled: XLA's (arguments, temporaries) in bytes, if the step was compiled.
        estimate: seconds per step if all of it ran as fast as a large convolution; a lower bound.
        measured: seconds per step on zeros, if the step was compiled and the estimate is short.
    """

    flops: float
    memory: dict[str, int]
    compiled: tuple[int, int] | None
    estimate: float
    measured: float | None


def dry_run(config: ConfigDict, workdir: str | None = None, *, compile_step: bool = False) -> None:
    """Prints the model, schedule, plan, memory and time of a run; writes nothing.

    Args:
        config: complete configuration.
        workdir: folder of the run, which is checked but not changed, or None.
        compile_step: compile the training step, however long that takes.

    Raises:
        UserError: whatever training would raise before its first step.
    """
    check_source(config, workdir)
    config = files.absolute_paths(config)
    configure_process(config)
    experiment = create_experiment(config, lambda: dataset_info(config.data.name, config.data.dir))
    prepared = prepare(experiment)
    plan, state = prepared.plan, prepared.state
    console = Console(active=experiment.shard.process == 0)
    new = not (workdir and checkpoint_steps(workdir))
    rows = describe(experiment, plan, state.params, new=new)
    if workdir is not None:
        rows.append(("workdir", workdir_state(workdir, config, state, experiment.dataset.described(), plan)))
    console.table("dry run: nothing is trained or written", rows)
    if new and config.init.weights:
        console.table("initial weights", fit_weights(config, state).rows())
    header, model_rows = parts_table(model_parts(experiment.model, experiment.image_shape))
    console.columns("model", header, model_rows)
    console.columns("schedule", ("step", "epoch", "learning rate", ""), schedule_rows(config, prepared))
    cost = step_cost(experiment, prepared, compile_step)
    console.table("plan", plan_rows(experiment, plan, state))
    console.table("memory of each device while training", memory_rows(experiment, cost))
    console.table("time", time_rows(experiment, plan, cost))


def workdir_state(
    path: str,
    config: ConfigDict,
    state: TrainState | None = None,
    info: DatasetInfo | None = None,
    plan: Plan | None = None,
) -> str:
    """Describes what training would find in a workdir.

    Args:
        path: the workdir.
        config: complete configuration.
        state: abstract state of the run; if given, compared with the newest checkpoint (unless in a bucket).
        info: the data set as it is now; if given, compared with the run's.
        plan: the plan of training; if given, compared with the run's progress.

    Raises:
        UserError: the workdir is not writable, or belongs to another run or optimizer.
    """
    workdir = find(path, light=True)
    if not is_remote(path):
        check_writable(workdir, "--workdir", "choose another")
        files.check_name(workdir)
    changes = files.check_same_run(workdir, config)
    changes += files.check_same_data(workdir, info) if info else []
    steps = checkpoint_steps(path)
    if not steps:
        if not is_remote(path):
            with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
                checkpoints.restore_latest(state)  # raises if the run had checkpoints
        return f"{path}: a new run"
    if plan and max(steps) >= plan.total_steps:
        return complete(path, max(steps), plan.total_steps)
    text = f"{path}: resumes from step {max(steps)}" + (f"; changed: {', '.join(changes)}" if changes else "")
    if state is not None and not is_remote(path):
        with contextlib.closing(Checkpoints(workdir, read_only=True, changes=changes)) as checkpoints:
            try:
                checkpoints.check_structure(max(steps), state)
                if plan:
                    check_same_size(checkpoints.progress(max(steps)).num_examples, plan.num_examples)
            except UnreadableCheckpoint as error:
                text += f", or from an older one: {error}"
    return text


def checkpoint_steps(path: str) -> list[int]:
    """Returns the steps for which a workdir has checkpoints."""
    with contextlib.closing(Checkpoints(find(path, light=True), read_only=True)) as checkpoints:
        return checkpoints.steps()


def schedule_rows(config: ConfigDict, prepared: Prepared) -> list[tuple[str, ...]]:
    """Returns (step, epoch, learning rate, event) rows at the schedule's turning points, in completed steps."""
    plan, schedule = prepared.plan, prepared.schedule
    warmup = warmup_steps(config, plan.steps_per_epoch, plan.total_steps)
    decays = decay_steps(config, plan.steps_per_epoch, plan.total_steps)
    corners: dict[int, list[str]] = {0: ["start"]}
    if warmup:
        corners.setdefault(warmup, []).append("end of the warm-up")
    for step in decays[:DECAYS_SHOWN]:
        corners.setdefault(step, []).append("decay")
    if config.schedule.name in ("cosine", "linear"):
        corners.setdefault((warmup + plan.total_steps) // 2, []).append("halfway through the decay")
    corners.setdefault(plan.total_steps - 1, []).append("last step")
    rows = []
    for step, what in sorted(corners.items()):
        rate = f"{float(schedule(jnp.asarray(step))):.4g}" if step < plan.total_steps else "-"
        late = "" if step < plan.total_steps else ", after the end of this run"
        rows.append((f"{step:,}", f"{step / plan.steps_per_epoch:.2f}", rate, ", ".join(what) + late))
    if len(decays) > DECAYS_SHOWN:
        rows.append(("...", "", "", f"and {len(decays) - DECAYS_SHOWN} more decays, the last at step {decays[-1]:,}"))
    return rows


def tree_bytes(tree: Any) -> int:
    """Returns the size in bytes of the arrays in a tree, which may be abstract."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def saved_bytes(experiment: Experiment, state: TrainState) -> int:
    """Returns the bytes that one device keeps from the forward pass for the backward pass, without the parameters.

    Counted in JAX's trace, before XLA optimises it.
    """
    model = experiment.model.clone(axis_name=None)  # the axis exists only inside shard_map
    training = experiment.config.training
    each = training.batch_size // experiment.mesh.devices.size // training.accumulation_steps
    images = jax.ShapeDtypeStruct((each, *experiment.image_shape), jnp.float32)

    def kept(params: Any, batch_stats: Any, images: jax.Array, key: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, _ = model.apply(
                variables, images, train=True, mutable=["batch_stats", "aux_logits"], rngs={"dropout": key}
            )
            return logits.mean()

        return jax.vjp(loss, params)[1]

    kept_tree = jax.eval_shape(kept, state.params, state.batch_stats, images, jax.random.key(0))
    return max(0, tree_bytes(kept_tree) - tree_bytes(state.params))


def step_cost(experiment: Experiment, prepared: Prepared, compile_step: bool) -> Cost:
    """Lowers the training step, compiles it if that is quick or requested, and returns its cost."""
    state, batch = prepared.state, experiment.abstract_batch
    optimizer = experiment.optimizer(prepared.schedule)
    step = make_train_step(experiment.model, optimizer, experiment.config, experiment.mesh)
    with programs_for(experiment.mesh.devices.flat[0]):  # like training, whose compilation cache then holds the step
        lowered = step.lower(state, batch)
    compiled = measured = None
    flops = step_flops(experiment, lowered)
    estimate = step_seconds(experiment, flops)
    if compile_step or len(jax.tree.leaves(state.params)) <= QUICK:
        step = lowered.compile()
        analysis = step.memory_analysis()
        compiled = (analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)
        if estimate < SHORT:
            measured = measured_seconds(step, state, batch)
    memory = {
        "parameters": tree_bytes(state.params),
        "batch statistics": tree_bytes(state.batch_stats),
        "optimizer": tree_bytes(state.opt_state),
        **({"moving average": tree_bytes(state.ema)} if state.ema else {}),
        # With accumulation, the gradient of one part and the sum.
        "gradients": tree_bytes(state.params) * (2 if experiment.config.training.accumulation_steps > 1 else 1),
        "batch": tree_bytes(batch) // experiment.mesh.devices.size,
        "activations": saved_bytes(experiment, state),
    }
    return Cost(flops, memory, compiled, estimate, measured)


def step_flops(experiment: Experiment, lowered: Any) -> float:
    """Returns the floating-point operations of a lowered training step on each device, as XLA counts them."""
    flops = float(lowered.cost_analysis()["flops"])
    if experiment.mesh.devices.flat[0].platform != "cpu":
        flops *= experiment.config.training.accumulation_steps  # XLA counts a loop's body once
    return flops


def run_seconds(experiment: Experiment, plan: Plan, seconds: float) -> float:
    """Returns the estimated seconds of a run with its evaluations, if a training step takes `seconds`."""
    evaluated = len(experiment.dataset.open(experiment.config.data.eval_split))
    # At the same image size, a forward pass takes a third of a training step.
    larger = (experiment.eval_image_shape[0] / experiment.image_shape[0]) ** 2
    evaluation = evaluated / experiment.config.training.batch_size * larger * seconds / 3
    return plan.total_steps * seconds + plan.evaluations * evaluation


def measured_seconds(step: Callable, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]) -> float | None:
    """Returns the fastest time of three calls of a compiled step on zeros, in seconds; None if memory runs out."""
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), tree)
    try:
        batch, times = zeros(batch), []
        for _ in range(4):  # the first is warm-up
            once = jax.block_until_ready(zeros(state))  # a new state per call, because the step donates it
            start = time.perf_counter()
            jax.block_until_ready(step(once, batch))
            times.append(time.perf_counter() - start)
    except jax.errors.JaxRuntimeError:
        return None
    return min(times[1:])


def measured_speed(device: jax.Device, dtype: Any, seconds: float = 1.0) -> float:
    """Returns the FLOP/s of a device for two 3x3 convolutions with BatchNorm, forward and backward.

    Real layers differ: small feature maps, grouped convolutions and attentions run slower, wide layers faster.
    """

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(2):
                x = nn.Conv(64, (3, 3), use_bias=False, dtype=dtype)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False, dtype=dtype)(x))
            return x

    block, large = Block(), device.platform != "cpu"
    x = jax.device_put(jnp.ones((128 if large else 8, 32, 32, 64), dtype), device)
    variables = jax.device_put(block.init(jax.random.key(0), x), device)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return block.apply(variables | {"params": params}, x, mutable=["batch_stats"])[0].astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables["params"], x)
    step, flops = lowered.compile(), float(lowered.cost_analysis()["flops"])
    jax.block_until_ready(step(variables["params"], x))
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        jax.block_until_ready(step(variables["params"], x))
        best = min(best, time.perf_counter() - before)
    return flops / best


def step_seconds(experiment: Experiment, flops: float) -> float:
    """Returns the estimated seconds of a training step, from the speed measured on the first local device."""
    device = jax.local_devices()[0]
    speed = measured_speed(device, jnp.dtype(experiment.config.model.dtype))
    # Simulated devices share the cores of one CPU.
    share = jax.local_device_count() if device.platform == "cpu" else 1
    return flops * share / speed


def size(number: float) -> str:
    """Formats a number of bytes, such as "1.23 MB"."""
    unit = 0
    while number >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {UNITS[unit]}"


def plan_rows(experiment: Experiment, plan: Plan, state: TrainState) -> list[tuple[str, str]]:
    """Returns rows on how often the run evaluates, saves and logs."""
    config = experiment.config
    evaluated = len(experiment.dataset.open(config.data.eval_split))
    every = config.checkpoint.every_steps
    large = f" of {config.evaluation.image_size} pixels" if config.evaluation.image_size else ""
    more = f" and every {every:,} steps" if every else ""
    one, keep = tree_bytes(state), config.checkpoint.keep
    return [
        ("steps", f"{plan.total_steps:,} = {plan.total_steps / plan.steps_per_epoch:.4g} epochs"),
        (
            "evaluations",
            f"{plan.evaluations:,}, every {plan.eval_every:,.6g} steps and at the end, each on {evaluated:,} "
            f"images{large} in {math.ceil(evaluated / experiment.eval_batch_size):,} batches of "
            f"{experiment.eval_batch_size:,}",
        ),
        (
            "checkpoints",
            f"after each evaluation{more}; {size(one)} each before compression, the latest {keep} and the best "
            f"are kept: up to {size(one * (keep + 1))}",
        ),
        ("logged", f"every {config.training.log_every_steps:,} steps"),
    ]


def memory_rows(experiment: Experiment, cost: Cost) -> list[tuple[str, str]]:
    """Returns rows on the memory of each device: known sizes, estimates, and XLA's analysis."""
    rows = [(name, size(number)) for name, number in cost.memory.items()]
    rows[-1] = ("activations", rows[-1][1] + " (estimate: kept for the backward pass, before XLA's optimisation)")
    rows.append(("total", f"about {size(sum(cost.memory.values()))} (estimate)"))
    if cost.compiled:
        arguments, temporaries = cost.compiled
        rows.append(
            ("compiled", f"{size(arguments + temporaries)} by XLA: {size(arguments)} of state and batch, "
                         f"{size(temporaries)} of temporaries")
        )  # fmt: skip
    else:
        rows.append(("compiled", "not compiled; --dry-run=compile compiles the step, which takes minutes"))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        rows.append(("available", size(limit)))
    return rows


def time_rows(experiment: Experiment, plan: Plan, cost: Cost) -> list[tuple[str, str]]:
    """Returns rows on the time of a step and of the run: measured, or a lower bound."""
    batch = experiment.config.training.batch_size
    seconds = cost.measured or cost.estimate
    whole = run_seconds(experiment, plan, seconds)
    speed = f"{seconds:.3g} s, {batch / seconds:,.0f} images/s"
    if cost.measured:
        step = f"about {speed} (measured here on zeros, without data loading)"
        run = f"about {duration(whole)} with the evaluations (estimate)"
    else:
        step = (
            f"at least {speed} (estimate: these operations at the speed of a 3x3 convolution with BatchNorm measured "
            "here; small layers, attentions and data loading make it longer, often several times)"
        )
        run = f"at least {duration(whole)} with the evaluations (estimate)"
    return [
        ("operations", f"{cost.flops / 1e9:,.3f} GFLOPs per step and device (XLA's count, before its optimisation)"),
        ("a step", step),
        ("total", run),
    ]
