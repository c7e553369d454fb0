"""Times train.py's training step for several networks, which take turns on one accelerator or on all CPU cores."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ml_collections import ConfigDict

from hga_flax.bench.race import Timing, benchmarks_of_others, race
from hga_flax.config.loading import base_config, validate
from hga_flax.errors import ConfigError, UserError

CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Contender:
    """A network ready to train.

    Attributes:
        model, attention: names for the report.
        params: number of parameters.
        compile_s: compilation time in seconds; for accelerators, all networks are compiled concurrently.
        run: runs the given number of steps and returns when they are finished.
        flops: FLOPs of one step, as counted by XLA, or None if unknown.
        peak_memory_bytes: peak memory of one step on one device, or None if unknown.
        devices: number of devices that share the batch.
    """

    model: str
    attention: str
    params: int
    compile_s: float
    run: Callable[[int], None]
    flops: float | None = None
    peak_memory_bytes: int | None = None
    devices: int = 1


def parse_attention(name: str) -> tuple[str, dict[str, Any]]:
    """Returns an attention's registered name and options; "hga-conv" is HGA's convolution form."""
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
    """Times whole training steps: forward, backward, optimizer update and metrics.

    Args:
        models: "NETWORK:ATTENTION"; the attention "hga-conv" is HGA's convolution form.
        batch: images per step.
        image_size: height and width of the images in pixels.
        dtype: type of the computation.
        rounds: number of measurements of each network.
        vs_torch: also time the networks' PyTorch counterparts on the same device.
        log: called with progress lines.

    Returns:
        Rows with the names, `params`, `step_ms` (median), `fastest_ms`, `spread` (interquartile range
        over median), `images_per_s`, `ratio_to_first`, `flops_per_s`, `peak_share`, `peak_memory_bytes`,
        `compile_s`, `device` and `devices` (number); unknown figures are None.

    Raises:
        UserError: an unknown network or attention, or PyTorch is requested but not installed.
    """
    named = [_split(model) for model in models]
    if vs_torch:
        torch_networks = benchmarks_of_others("torch_networks", "bench step --vs-torch")
        torch_networks.check([model for model, _ in named])
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory for PyTorch
    import jax

    from hga_flax.processes.settings import configure_process

    configurations = [configuration(*names, batch, image_size, dtype) for names in named]
    configure_process(configurations[0])  # before JAX initialises its devices: XLA reads its flags then
    on_cpus = jax.default_backend() == "cpu"

    def prepare(number: int) -> Contender:
        log(f"compiling {' with '.join(named[number])} ...")
        contender = _contender(*named[number], configurations[number])
        log(f"compiled {' with '.join(named[number])} in {contender.compile_s:.0f} s")
        return contender

    # An accelerator's host has spare cores; on CPUs, concurrent compilations would distort each other's times.
    with ThreadPoolExecutor(1 if on_cpus else len(named)) as pool:
        contenders = list(pool.map(prepare, range(len(named))))
    if vs_torch:
        contenders += torch_networks.contenders([model for model, _ in named], batch, image_size, dtype, log)
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


def configuration(model: str, attention: str, batch: int, image_size: int, dtype: str) -> ConfigDict:
    """Returns the configuration of a contender: the default one for ImageNet, without augmentation on the host.

    Raises:
        UserError: an unknown network or attention, or a combination that does not fit.
    """
    name, options = parse_attention(attention)
    config = base_config()
    config.model.name, config.model.attention, config.model.dtype = model, name, dtype
    config.model.attention_options = ", ".join(f"{key}={value!r}" for key, value in options.items())
    config.data.image_size, config.data.augmentation = image_size, "none"
    config.training.batch_size = batch
    config.training.compilation_cache = ""  # so that `compile_s` measures a real compilation
    try:
        return validate(config)
    except ConfigError as error:
        raise UserError(f"--models={model}:{attention}: {error}") from None


def random_state(shapes: Any) -> Any:
    """Returns a training state of random numbers, which saves compiling the real initialisation.

    Args:
        shapes: a `TrainState` of shapes, see `hga_flax.training.state.abstract_state`.
    """
    import jax
    import numpy as np

    random = np.random.RandomState(0)

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        part, name = getattr(path[0], "name", ""), getattr(path[-1], "key", "")
        ones = part in ("params", "batch_stats") and name in ("scale", "var")
        array = np.full(leaf.shape, ones, leaf.dtype)
        if part == "params" and leaf.ndim > 1:
            fan_in = np.prod(leaf.shape[:-1])
            array = (random.standard_normal(leaf.shape) * (2 / fan_in) ** 0.5).astype(leaf.dtype)
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(value, shapes)


def _contender(model: str, attention: str, config: ConfigDict) -> Contender:
    import jax
    import numpy as np

    from hga_flax.bench.compiled_step import training_step
    from hga_flax.counting.compiled import cost
    from hga_flax.processes.mesh import DATA_AXIS, most_devices

    devices = jax.devices()
    devices = devices[: most_devices(config, len(devices)) if devices[0].platform == "cpu" else 1]
    mesh = jax.make_mesh((len(devices),), (DATA_AXIS,), devices=devices)
    train_step, shapes, batch_shapes = training_step(config, mesh)
    random, limit = np.random.RandomState(0), {"image": 256, "label": CLASSES}
    batch = {
        name: jax.device_put(random.randint(0, limit.get(name, 1), leaf.shape).astype(leaf.dtype), leaf.sharding)
        for name, leaf in batch_shapes.items()
    }
    start = time.perf_counter()
    compiled = train_step.lower(shapes, batch).compile()
    compile_s = time.perf_counter() - start
    measured, held = cost(compiled), [random_state(shapes)]
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0], report = compiled(held[0], batch)
        jax.block_until_ready((held[0], report))

    run(1)
    flops: float | None = measured.flops
    if devices[0].platform == "cpu":  # gradients of convolutions are loops there; XLA counts one iteration
        on_gpus = train_step.trace(shapes, batch).lower(lowering_platforms=("cuda",))
        flops = on_gpus.cost_analysis()["flops"] * len(devices)
    return Contender(model, attention, params, compile_s, run, flops, measured.peak_memory_bytes, len(devices))


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
        "devices": contender.devices,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a printable table."""
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
    return "\n".join([*lines, f"on {rows[0]['devices']} x {rows[0]['device']}; ratio: to the first, turn by turn"])
