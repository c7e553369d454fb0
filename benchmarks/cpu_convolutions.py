"""Times forms of a dense convolution on all cores: python benchmarks/cpu_convolutions.py [resnet50|cifar ...]

xla: lax.conv_general_dilated and its gradients; taps: a product of matrices per kernel element; im2col: one product
with what every window covers; blocks: the kernel's gradient of `hga_flax.models.convolution`. GFLOP/s, best of 20.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from hga_flax.models import convolution

# batch, height and width of the input, channels of the input and the output, size of the kernel, stride
SHAPES = {
    "resnet50": [
        (16, 56, 64, 64, 3, 1), (16, 28, 128, 128, 3, 1), (16, 14, 256, 256, 3, 1), (16, 7, 512, 512, 3, 1),
        (16, 56, 128, 128, 3, 2), (16, 28, 256, 256, 3, 2), (16, 14, 512, 512, 3, 2), (16, 224, 3, 64, 7, 2),
    ],
    "cifar": [(128, 24, 16, 16, 3, 1), (128, 12, 32, 32, 3, 1), (128, 6, 64, 64, 3, 1)],
}  # fmt: skip
MOST_TURNS, SECONDS = 20, 0.25
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def forms(stride: int, margin: int) -> dict[str, Callable[..., jax.Array]]:
    """Returns the forms of a convolution, functions of a map and a kernel."""
    strides, pads = (stride, stride), ((margin, margin),) * 2
    options: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def windows(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution._columns(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel.shape[:2], strides)

    def taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
        parts = jnp.split(windows(x, kernel), kernel.shape[0] * kernel.shape[1], axis=-1)
        return sum(map(jnp.matmul, parts, kernel.reshape(-1, *kernel.shape[2:])))

    return {
        "xla": lambda x, kernel: lax.conv_general_dilated(x, kernel, strides, pads, **options),
        "taps": taps,
        "im2col": lambda x, kernel: windows(x, kernel) @ kernel.reshape(-1, kernel.shape[-1]),
        "blocks": lambda x, kernel: convolution._convolve(x, kernel, strides, pads, tuple(options.items())),
    }


def rate(function: Callable[..., Any], arguments: tuple, flops: float) -> float:
    """Returns GFLOP/s of the fastest turn."""
    jax.block_until_ready(function(*arguments))
    fastest, began = float("inf"), time.perf_counter()
    for _ in range(MOST_TURNS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        fastest = min(fastest, time.perf_counter() - start)
        if time.perf_counter() - began > SECONDS:
            break
    return flops / fastest / 1e9


def main() -> None:
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    draw = np.random.RandomState(0).standard_normal
    place = lambda shape, spec: jax.device_put(draw(shape).astype(np.float32), NamedSharding(mesh, spec))
    over = partial(jax.shard_map, mesh=mesh, check_vma=False)
    square = jnp.ones((1024, 1024))
    print(
        f"{jax.device_count()} devices; a product of 1024x1024: {rate(jax.jit(jnp.matmul), (square,) * 2, 2**31):.0f}"
    )
    for batch, size, inputs, outputs, window, stride in (s for name in sys.argv[1:] or SHAPES for s in SHAPES[name]):
        x, kernel = place((batch, size, size, inputs), SPLIT), place((window, window, inputs, outputs), WHOLE)
        gradient = place((batch, size // stride, size // stride, outputs), SPLIT)
        flops = 2 * gradient.size * kernel.size / outputs
        found = []
        for name, form in forms(stride, window // 2).items():
            forward = over(form, in_specs=(SPLIT, WHOLE), out_specs=SPLIT)
            to_input = over(lambda x, k, g, f=form: jax.vjp(lambda x: f(x, k), x)[1](g)[0],
                            in_specs=(SPLIT, WHOLE, SPLIT), out_specs=SPLIT)  # fmt: skip
            to_kernel = over(lambda x, k, g, f=form: jax.vjp(lambda k: f(x, k), k)[1](g)[0][None],
                             in_specs=(SPLIT, WHOLE, SPLIT), out_specs=SPLIT)  # fmt: skip
            rates = [rate(jax.jit(forward), (x, kernel), flops)]
            rates += [rate(jax.jit(f), (x, kernel, gradient), flops) for f in (to_input, to_kernel)]
            found.append(f"{name} " + " / ".join(f"{r:.0f}" for r in rates))
        print(f"{window}x{window}, stride {stride}, {inputs} -> {outputs}, {size}x{size}, batch {batch}: "
              "forward / to the input / to the kernel: " + ", ".join(found), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
