"""Times three forms of ResNeXt's grouped convolution: python -m benchmarks.grouped_forms [--batch=16]

grouped: feature_group_count; dense: one convolution with a block-diagonal kernel; einsum: a matrix product
for each of the nine kernel elements, batched over the groups. Times include the gradients.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hga_flax.errors import ArgumentParser, UserError, run_main
from hga_flax.models.convolution import block_diagonal

GROUPS, ROUNDS = 32, 5
STAGES = ((56, 128), (28, 256), (14, 512), (7, 1024))
OPTIONS = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, feature_group_count=GROUPS, **OPTIONS)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, block_diagonal(kernel, GROUPS), **OPTIONS)


def einsum(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(batch, height + 2, width + 2, GROUPS, -1)
    taps = kernel.reshape(3, 3, channels // GROUPS, GROUPS, -1)
    y = sum(
        jnp.einsum("bhwgc,cgd->bhwgd", padded[:, i : i + height, j : j + width], taps[i, j])
        for i in range(3)
        for j in range(3)
    )
    return y.reshape(batch, height, width, -1)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images in a batch (default: 16)")
    batch, random = parser.parse_args().batch, np.random.RandomState(0)
    if batch < 1:
        raise UserError(f"--batch={batch}: must be at least 1")
    print(f"{jax.devices()[0].device_kind}, batch {batch}: ms, forward and backward, fastest of {ROUNDS}")
    for size, channels in STAGES:
        x = jnp.asarray(random.standard_normal((batch, size, size, channels)), jnp.float32)
        kernel = jnp.asarray(random.standard_normal((3, 3, channels // GROUPS, channels)), jnp.float32)
        forms = {}
        for form in (grouped, dense, einsum):
            loss = lambda x, kernel, form=form: jnp.sin(form(x, kernel)).sum()
            forms[form.__name__] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, kernel).compile()
        results = {name: jax.block_until_ready(step(x, kernel)) for name, step in forms.items()}
        for name, result in results.items():
            for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(results["grouped"]), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2 * float(jnp.abs(b).max()), err_msg=name)
        fastest = dict.fromkeys(forms, float("inf"))
        for _ in range(ROUNDS):
            for name, step in forms.items():
                start = time.perf_counter()
                jax.block_until_ready(step(x, kernel))
                fastest[name] = min(fastest[name], time.perf_counter() - start)
        print(f"{size}x{size}x{channels}  " + "  ".join(f"{name} {t * 1e3:.1f}" for name, t in fastest.items()))


if __name__ == "__main__":
    run_main(main)
