"""Builds the parts of a run from its configuration: devices, data, network, optimizer."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from hga_flax.config.loading import build_model
from hga_flax.data.pipeline import Dataset, Shard
from hga_flax.data.sources import DatasetInfo
from hga_flax.errors import ConfigError, UserError
from hga_flax.processes.coordination import check_alike
from hga_flax.processes.mesh import DATA_AXIS, check_batch_size, check_training_batch, create_mesh
from hga_flax.processes.settings import check_configuration
from hga_flax.runs.progress import planned_steps
from hga_flax.training.optimizer import create_optimizer, create_schedule, warmup_steps
from hga_flax.training.parameters import check_patterns, describe_groups
from hga_flax.training.state import TrainState, abstract_state, check_evaluation, check_training, make_init

MOST_EXAMPLES = 2**31 - 1  # per process, because example indices are int32


@dataclasses.dataclass(frozen=True)
class Plan:
    """When a run evaluates and ends, in optimizer steps.

    Attributes:
        num_examples: size of the training split.
        steps_per_epoch: steps per epoch; fractional if the batch size does not divide the split.
        total_steps: step at which training ends.
        eval_every: steps between evaluations, at least 1; may be fractional.
    """

    num_examples: int
    steps_per_epoch: float
    total_steps: int
    eval_every: float

    def evaluates_at(self, step: int) -> bool:
        """Returns True at the last step and at the step nearest to each multiple of `eval_every` (without drift)."""
        nearest = round(step / self.eval_every)
        return step == self.total_steps or step in (
            round(k * self.eval_every) for k in (nearest - 1, nearest, nearest + 1) if k
        )

    @property
    def evaluations(self) -> int:
        """Number of evaluations of the whole run."""
        last = math.floor(self.total_steps / self.eval_every) + 1
        while round(last * self.eval_every) >= self.total_steps:
            last -= 1
        return last + 1


def make_plan(config: ConfigDict, num_examples: int) -> Plan:
    """Converts epochs to steps for a training split of `num_examples`.

    Raises:
        ConfigError: the batch is larger than the split, or training needs more examples than an int32 can count.
    """
    batch_size = config.training.batch_size
    if batch_size > num_examples:
        more = "; raise data.fake_examples or lower the batch" if config.data.fake else ""
        raise ConfigError(
            f"training.batch_size={batch_size}: the training split has only {num_examples} examples{more}"
        )
    per_epoch = num_examples / batch_size
    total = planned_steps(config, num_examples)
    if total * batch_size // jax.process_count() >= MOST_EXAMPLES:
        key = "steps" if config.training.steps else "epochs"
        raise ConfigError(
            f"training.{key}={config.training[key]}: {total:,} steps of {batch_size} exceed the limit of "
            f"{MOST_EXAMPLES:,} examples per process"
        )
    return Plan(num_examples, per_epoch, total, max(1.0, config.evaluation.every_epochs * per_epoch))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run that follow from its configuration and the available devices.

    Attributes:
        config: complete configuration.
        mesh: mesh of all devices.
        shard: index of this process and number of processes.
        dataset: the data set.
        model: the network.
        image_shape: `(H, W, C)` of training images.
    """

    config: ConfigDict
    mesh: Mesh
    shard: Shard
    dataset: Dataset
    model: nn.Module
    image_shape: tuple[int, int, int]

    @property
    def eval_image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of images in evaluation and wherever else the trained network is used."""
        size = self.config.evaluation.image_size or self.config.data.image_size
        return size, size, self.image_shape[2]

    @property
    def eval_batch_size(self) -> int:
        """Global batch size of evaluation."""
        return self.config.evaluation.batch_size or self.config.training.batch_size

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global training batch."""
        size, sharding = self.config.training.batch_size, NamedSharding(self.mesh, PartitionSpec(DATA_AXIS))
        make = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        numbers = {name: make((size,), jnp.int32) for name in ("label", "index", "epoch")}
        return {"image": make((size, *self.image_shape), jnp.uint8)} | numbers

    def optimizer(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """Returns the configured optimizer."""
        return create_optimizer(self.config, schedule)

    def schedule(self, plan: Plan) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        return create_schedule(self.config, plan.steps_per_epoch, plan.total_steps)

    def init(self, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], TrainState]:
        """Returns the function `init(key)` that makes the initial state."""
        return make_init(self.model, optimizer, self.image_shape, ema=self.config.training.ema_decay > 0)


def create_experiment(
    config: ConfigDict,
    info: DatasetInfo | Callable[[], DatasetInfo],
    *,
    train: bool = True,
    mesh: Mesh | None = None,
) -> Experiment:
    """Checks the configuration and builds the parts of the run.

    Args:
        config: complete configuration.
        info: description of the data set, or a function that returns it, called once the configuration is checked.
        train: False to check only what evaluation needs, and to do without a compilation cache that cannot be
            written.
        mesh: device mesh; None for all devices.

    Raises:
        UserError: the configuration cannot be run here.
    """
    check_configuration(config, train=train)
    mesh = mesh or create_mesh()
    if train:
        check_training_batch(config, mesh.devices.size)
    check_batch_size("evaluation.batch_size", config.evaluation.batch_size, mesh.devices.size)
    info = info() if callable(info) else info
    if train and info.num_classes < 2:
        only = f", {info.class_names[0]!r}" if info.class_names else ""
        deep = "; is data.dir one level too high?" if config.data.name == "folder" else ""
        raise UserError(f"{info.name} has only one class{only}: training needs at least two{deep}")
    for key in ("mean", "std"):
        if len(config.data[key]) not in (1, info.channels):
            noun, more = ("channels", f" or {info.channels}") if info.channels > 1 else ("channel", "")
            raise ConfigError(
                f"data.{key}={config.data[key]}: {info.name} has {info.channels} {noun}; give one number{more}"
            )
    axis_name = DATA_AXIS if config.training.batch_norm_scope == "global" else None
    size = config.data.image_size
    return Experiment(
        config=config,
        mesh=mesh,
        shard=Shard(jax.process_index(), jax.process_count()),
        dataset=Dataset(info, config.data, config.seed, config.evaluation.image_size),
        model=build_model(config, info.num_classes, axis_name),
        image_shape=(size, size, info.channels),
    )


class Prepared(NamedTuple):
    """What is known about a run before its first image is read; arrays in `state` are abstract."""

    plan: Plan
    schedule: optax.Schedule
    init: Callable[[jax.Array], TrainState]
    state: TrainState


def prepare(experiment: Experiment) -> Prepared:
    """Runs the checks that need the data set or the network, without reading images or compiling.

    Raises:
        UserError: a split does not exist or is too small, the schedule does not fit the run, or the network
            cannot be built or trained with its options.
    """
    dataset, config = experiment.dataset, experiment.config
    dataset.open(config.data.eval_split)
    plan = make_plan(config, len(dataset.open(config.data.train_split)))
    schedule = experiment.schedule(plan)
    init = experiment.init(experiment.optimizer(schedule))
    state = abstract_state(init, experiment.mesh)
    check_patterns(config, state.params)
    check_training(experiment.model, state, experiment.image_shape)
    if experiment.eval_image_shape != experiment.image_shape:  # at one size abstract_state has traced it
        check_evaluation(experiment.model, state, experiment.eval_image_shape)
    return Prepared(plan, schedule, init, state)


def parameters_by_part(params: Any) -> dict[str, int]:
    """Returns the number of parameters of the stem, each stage and the head, and of all attentions together."""
    parts: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = [entry.key for entry in path]
        part = "attention" if "attention" in names else names[0].split("_")[0]
        parts[part] = parts.get(part, 0) + leaf.size
    return parts


def describe(experiment: Experiment, plan: Plan, params: Any, *, new: bool = True) -> list[tuple[str, str]]:
    """Returns the (name, value) rows that a run prints when it starts.

    Args:
        experiment: the run.
        plan: plan of the run.
        params: tree of the parameters or of their shapes.
        new: False if the run resumes from a checkpoint.
    """
    from hga_flax.counting.complexity import complexity

    config, mesh = experiment.config, experiment.mesh
    try:
        counts = complexity(experiment.model, experiment.image_shape)
        size = f"{counts.params:,} parameters, {counts.gflops:.4g} GFLOPs an image (multiply-accumulates + 2 x norm)"
    except ValueError as error:  # an attention with a loop of unknown length, or a kernel of its own
        size = f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters; {error}"
    device = mesh.devices.flat[0]
    batch, large = config.training.batch_size, config.evaluation.image_size
    in_parts = f" in {parts} parts" if (parts := config.training.accumulation_steps) > 1 else ""
    rows = [
        ("model", f"{config.model.name}, attention {config.model.attention}, {config.model.dtype}"),
        ("size", size),
        ("parameters", ", ".join(f"{part} {size:,}" for part, size in parameters_by_part(params).items())),
        (
            "images",
            "x".join(str(n) for n in experiment.image_shape)
            + (f", evaluated at {large}x{large}" if large else "")
            + f", {experiment.dataset.info.num_classes} classes",
        ),
        (
            "devices",
            f"{mesh.devices.size} x {device.device_kind} ({device.platform}), {jax.process_count()} process(es), "
            f"{batch // mesh.devices.size} images each{in_parts}",
        ),
    ]
    fake = " (synthetic)" if config.data.fake else ""
    warmup = warmup_steps(config, plan.steps_per_epoch, plan.total_steps)
    late = [step for step in config.schedule.decay_at_steps if step >= plan.total_steps]
    cut = f", all within the warm-up of {warmup:,} steps" if warmup >= plan.total_steps else ""
    if late:
        cut += f", before the decay{'s' if len(late) > 1 else ''} at {' and '.join(f'{step:,}' for step in late)}"
    rows += [
        ("data", f"{config.data.name}{fake}, {plan.num_examples:,} examples to train on"),
        ("plan", f"{plan.total_steps:,} steps of {batch} = {plan.total_steps / plan.steps_per_epoch:.4g} epochs" + cut),
    ]
    if new and config.init.weights:
        rows.append(("weights", f"initialised from {config.init.weights}"))
    return rows + describe_groups(config, params)


def check_data_alike(info: DatasetInfo) -> None:
    """Compares the data set, which each process opens by itself; every process must call it at the same place.

    Raises:
        UserError: a process has another one; all processes raise the same error.
    """
    facts = {f"the data set's {name}": getattr(info, name) for name in ("name", "num_classes", "channels")}
    facts |= {f"the class of label {label}": name for label, name in enumerate(info.class_names)}
    facts |= {f"the number of examples in '{split}'": size for split, size in info.num_examples.items()}
    facts |= {f"the checksum of the files' names and classes in '{split}'": d for split, d in info.digests.items()}
    check_alike(facts)
