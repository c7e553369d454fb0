"""Times forms of a dense convolution and its gradients on all cores: python -m benchmarks.cpu_convolutions [--set=SET]

xla: lax.conv_general_dilated and its gradients; taps: a matrix product for each kernel element; im2col: one matrix
product with all windows; ours: the form used in training, `hga_flax.models.convolution`. The forms take turns; prints
the GFLOP/s of each form's fastest turn, for all devices together.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from hga_flax.bench.race import race
from hga_flax.data.pipeline import available_cores
from hga_flax.errors import ArgumentParser, run_main
from hga_flax.models import convolution

# batch, height and width of the input, channels of the input and the output, size of the kernel, stride
SHAPES = {
    "resnet50": [
        (16, 56, 64, 64, 3, 1), (16, 28, 128, 128, 3, 1), (16, 14, 256, 256, 3, 1), (16, 7, 512, 512, 3, 1),
        (16, 56, 128, 128, 3, 2), (16, 28, 256, 256, 3, 2), (16, 14, 512, 512, 3, 2), (16, 224, 3, 64, 7, 2),
    ],
    "cifar": [(128, 24, 16, 16, 3, 1), (128, 12, 32, 32, 3, 1), (128, 6, 64, 64, 3, 1)],
}  # fmt: skip
ROUNDS = 4
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def forms(stride: int, margin: int) -> dict[str, Callable[..., jax.Array]]:
    """Returns the forms of a convolution: functions of a feature map and a kernel."""
    strides, pads = (stride, stride), ((margin, margin),) * 2
    options: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    pad = lambda x: jnp.pad(x, ((0, 0), *pads, (0, 0)))

    def taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
        parts = convolution._taps(pad(x), kernel.shape[:2], strides)
        return sum(map(jnp.matmul, parts, kernel.reshape(-1, *kernel.shape[2:])))

    def im2col(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution._columns(pad(x), kernel.shape[:2], strides) @ kernel.reshape(-1, kernel.shape[-1])

    return {
        "xla": partial(lax.conv_general_dilated, window_strides=strides, padding=pads, **options),
        "taps": taps,
        "im2col": im2col,
        "ours": partial(convolution.convolution, strides=strides, padding=pads, feature_group_count=1, **options),
    }


def programs(form: Callable[..., jax.Array], mesh: jax.sharding.Mesh, arrays: tuple) -> list[Callable[[int], None]]:
    """Returns compiled functions that repeat the forward pass, the gradient of the input and that of the kernel."""
    over = partial(jax.shard_map, mesh=mesh, check_vma=False)
    to_input = lambda x, kernel, gradient: jax.vjp(lambda x: form(x, kernel), x)[1](gradient)[0]
    to_kernel = lambda x, kernel, gradient: jax.vjp(lambda kernel: form(x, kernel), kernel)[1](gradient)[0][None]
    ready = []
    for function, count in ((form, 2), (to_input, 3), (to_kernel, 3)):
        compiled = jax.jit(over(function, in_specs=(SPLIT, WHOLE, SPLIT)[:count], out_specs=SPLIT))

        def run(times: int, compiled: Any = compiled, arguments: tuple = arrays[:count]) -> None:
            for _ in range(times):
                jax.block_until_ready(compiled(*arguments))

        run(1)
        ready.append(run)
    return ready


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=SHAPES, help="set of shapes (default: all)")
    chosen = parser.parse_args().set
    shapes = [shape for name in ([chosen] if chosen else SHAPES) for shape in SHAPES[name]]
    common = math.gcd(*(shape[0] for shape in shapes))  # every batch is split over the same devices
    devices = max(n for n in range(1, available_cores() + 1) if common % n == 0)
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    draw = np.random.RandomState(0).standard_normal
    place = lambda spec, *shape: jax.device_put(draw(shape).astype(np.float32), NamedSharding(mesh, spec))
    square, product = jnp.ones((1024, 1024)), jax.jit(jnp.matmul)

    def multiply(times: int) -> None:
        for _ in range(times):
            product(square, square).block_until_ready()

    multiply(1)
    for batch, size, inputs, outputs, window, stride in shapes:
        gradient = place(SPLIT, batch, size // stride, size // stride, outputs)
        kernel = place(WHOLE, window, window, inputs, outputs)
        arrays = place(SPLIT, batch, size, size, inputs), kernel, gradient
        by_form = {name: programs(form, mesh, arrays) for name, form in forms(stride, window // 2).items()}
        timings = race([run for runs in by_form.values() for run in runs] + [multiply], ROUNDS)
        rates = [2 * gradient.size * kernel.size / outputs / timing.fastest / 1e9 for timing in timings[:-1]]
        print(f"{window}x{window}/{stride} {inputs} -> {outputs}, {size}x{size}, batch {batch} (1024^3: "
              f"{2**31 / timings[-1].fastest / 1e9:.0f})", end="")  # fmt: skip
        for part, what in enumerate(("forward", "input", "kernel")):
            print(
                f"  {what}: " + ", ".join(f"{n} {r:.0f}" for n, r in zip(by_form, rates[part::3], strict=True)), end=""
            )
        print(flush=True)


if __name__ == "__main__":
    run_main(main)
