"""Whole training steps of several networks on one device, timed in turns.

Imports JAX, Flax, Optax and NumPy alone: copy the package to a bare GPU machine and it runs.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from hga_flax.bench.race import Timing, race
from hga_flax.errors import UserError

CLASSES = 1000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4
AUXILIARY_WEIGHT = 0.3  # of each auxiliary head's loss, as in training


@dataclasses.dataclass(frozen=True)
class Contender:
    """A network ready to train.

    Attributes:
        model, attention: names for the report.
        params: number of parameters.
        compile_s: seconds until its first step could run.
        run: takes a number of steps and returns when they are done.
        flops: of one step, as XLA counts them, or None.
        peak_memory_bytes: of one step, or None where it is not known.
    """

    model: str
    attention: str
    params: int
    compile_s: float
    run: Callable[[int], None]
    flops: float | None = None
    peak_memory_bytes: int | None = None


def parse_attention(name: str) -> tuple[str, dict[str, Any]]:
    """Returns an attention's registered name and options: "hga-conv" is HGA by its convolutions."""
    return ("hga", {"form": "conv"}) if name == "hga-conv" else (name, {})


def bench_step(
    models: Sequence[str],
    batch: int,
    image_size: int,
    dtype: str,
    rounds: int,
    vs_torch: bool,
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Times training steps: forward, backward, SGD with momentum and weight decay, batch statistics.

    Args:
        models: "NETWORK:ATTENTION"; the attention "hga-conv" is HGA by its convolutions.
        batch: images a step.
        image_size: height and width of the images, pixels.
        dtype: of the computation.
        rounds: turns of each.
        vs_torch: time PyTorch's networks on the same device too.
        log: takes lines about what is going on.

    Returns:
        Rows with the names, `params`, `step_ms` (median), `fastest_ms`, `spread` (quartiles over
        median), `images_per_s`, `ratio_to_first`, `flops_per_s`, `peak_share`, `peak_memory_bytes`,
        `compile_s`, `device`; None where a figure is not known.

    Raises:
        UserError: an unknown network or attention, or PyTorch is asked for and not there.
    """
    named = [_split(model) for model in models]
    if vs_torch:
        from hga_flax.bench import torch_peers as bench_torch  # raises before anything is compiled

        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave GPU memory for PyTorch
    import jax

    built = [(model, attention, _build(model, attention, dtype)) for model, attention in named]
    contenders = []
    for model, attention, network in built:
        log(f"compiling {model} with {attention} ...")
        contenders.append(_contender(model, attention, network, batch, image_size))
    if vs_torch:
        contenders += bench_torch.contenders(batch, image_size, dtype, log)
    log(f"{rounds} rounds of {len(contenders)} networks, {batch} images of {image_size}x{image_size}, {dtype} ...")
    timings = race([contender.run for contender in contenders], rounds)
    device = jax.devices()[0]
    return [
        _row(contender, timing, batch, dtype, device) for contender, timing in zip(contenders, timings, strict=True)
    ]


def _split(model: str) -> tuple[str, str]:
    name, colon, attention = model.partition(":")
    if not (name and colon and attention):
        raise UserError(f"--models: '{model}' is not NETWORK:ATTENTION, such as resnet50:hga or resnet50:none")
    return name, attention


def _build(model: str, attention: str, dtype: str) -> Any:
    import jax.numpy as jnp

    from hga_flax.models import create_model

    name, options = parse_attention(attention)
    try:
        return create_model(
            model, attention=name, attention_options=options, num_classes=CLASSES, dtype=jnp.dtype(dtype)
        )
    except ValueError as error:
        raise UserError(f"--models: {error}") from None


def make_step(network: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns `init(images) -> state` and `step(state, images, labels) -> (state, loss)`, not yet compiled.

    The state is made of random numbers in the place of a proper start, which would have to be compiled.
    The step is that of training on one device: uint8 images are normalised, the loss is the mean
    cross-entropy, weight decay joins the gradient before the momentum.
    """
    import jax
    import numpy as np
    import optax

    from hga_flax.images.device_augmentation import normalize

    optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM))

    def init(images: jax.Array) -> Any:
        random = np.random.RandomState(0)

        def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            if len(leaf.shape) > 1:
                fan_in = np.prod(leaf.shape[:-1])
                return (random.standard_normal(leaf.shape) * (2 / fan_in) ** 0.5).astype(leaf.dtype)
            return np.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)

        shape = jax.ShapeDtypeStruct((1, *images.shape[1:]), "float32")
        shapes = jax.eval_shape(lambda images: network.init(jax.random.key(0), images, train=False), shape)
        params, batch_stats = (
            jax.tree.map(jax.device_put, jax.tree_util.tree_map_with_path(value, shapes.get(collection, {})))
            for collection in ("params", "batch_stats")
        )
        return params, batch_stats, optimizer.init(params)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, batch_stats, opt_state = state

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = network.apply(
                {"params": params, "batch_stats": batch_stats},
                normalize(images, MEAN, STD),
                train=True,
                mutable=["batch_stats", "aux_logits"],
                rngs={"dropout": jax.random.key(0)},
            )
            mean_loss = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            auxiliary = jax.tree.leaves(updates.get("aux_logits", {}))
            return mean_loss(logits) + AUXILIARY_WEIGHT * sum(map(mean_loss, auxiliary)), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), updates.get("batch_stats", {}), opt_state), loss

    return init, step


def _contender(model: str, attention: str, network: Any, batch: int, image_size: int) -> Contender:
    import jax
    import numpy as np

    from hga_flax.counting.compiled import cost

    random = np.random.RandomState(0)
    images = jax.device_put(random.randint(0, 256, (batch, image_size, image_size, 3)).astype(np.uint8))
    labels = jax.device_put(random.randint(0, CLASSES, batch).astype(np.int32))
    init, step = make_step(network)
    state = init(images)
    params = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, images, labels).compile()
    compile_s = time.perf_counter() - start
    measured = cost(compiled)
    held = [state]

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0], loss = compiled(held[0], images, labels)
        jax.block_until_ready((held[0], loss))

    run(1)
    return Contender(model, attention, params, compile_s, run, measured.flops, measured.peak_memory_bytes)


def _row(contender: Contender, timing: Timing, batch: int, dtype: str, device: Any) -> dict[str, Any]:
    from hga_flax.counting.devices import limits

    limit = limits(device)
    rate = contender.flops / timing.median if contender.flops else None
    return {
        "model": contender.model,
        "attention": contender.attention,
        "params": contender.params,
        "step_ms": timing.median * 1e3,
        "fastest_ms": timing.fastest * 1e3,
        "spread": timing.spread,
        "images_per_s": batch / timing.median,
        "ratio_to_first": timing.ratio_to_first,
        "flops_per_s": rate,
        "peak_share": rate / limit.flops if rate and limit and dtype == "bfloat16" else None,
        "peak_memory_bytes": contender.peak_memory_bytes,
        "compile_s": contender.compile_s,
        "device": device.device_kind,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table for a person."""
    lines = [
        f"{'network':22} {'attention':10} {'params':>11} {'step ms':>9} {'fastest':>9} {'spread':>7} {'images/s':>9} "
        f"{'ratio':>6} {'TFLOP/s':>8} {'of peak':>8} {'GiB':>6} {'compile s':>9}"
    ]
    for row in rows:
        shown = lambda key, scale, form, row=row: "-" if row[key] is None else format(row[key] * scale, form)
        lines.append(
            f"{row['model']:22} {row['attention']:10} {row['params']:>11,} {row['step_ms']:>9.2f} "
            f"{row['fastest_ms']:>9.2f} {row['spread']:>7.1%} {row['images_per_s']:>9.1f} "
            f"{row['ratio_to_first']:>6.3f} {shown('flops_per_s', 1e-12, '.2f'):>8} {shown('peak_share', 1, '.1%'):>8} "
            f"{shown('peak_memory_bytes', 2**-30, '.2f'):>6} {row['compile_s']:>9.1f}"
        )
    return "\n".join([*lines, f"on one {rows[0]['device']}; ratio: to the first, turn by turn"])
