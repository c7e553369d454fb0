import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.training.norm import SMALL_LEAF, TOGETHER, clip_by_global_norm, global_norm, norm_of_concatenated


def gradient(leaves=TOGETHER + 3):
    draw = np.random.RandomState(0).standard_normal
    shapes = [(SMALL_LEAF + 1,), (1, 3, 2), (), *((i % 7 + 1,) for i in range(leaves))]
    return {str(i): jnp.asarray(draw(shape), jnp.float32) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("norm", [global_norm, norm_of_concatenated])
def test_the_norm_is_that_of_all_values(norm):
    tree = gradient()
    values = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in tree.values()])
    assert float(norm(tree)) == pytest.approx(np.linalg.norm(values), rel=1e-6)


def test_on_cpus_it_is_optaxs_to_the_last_bit():
    tree = gradient()
    assert jax.jit(global_norm)(tree) == jax.jit(optax.tree.norm)(tree)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["0", "1"])
def test_what_is_not_finite_is_seen(bad, name):
    tree = gradient()
    tree[name] = tree[name].at[0].set(bad)
    assert not np.isfinite(norm_of_concatenated(tree))


def test_a_gpu_sums_small_arrays_together_and_other_platforms_each_by_itself():
    tree = gradient()
    sums = {}
    for platform in ("cuda", "rocm", "cpu", "tpu"):
        text = jax.jit(global_norm).trace(tree).lower(lowering_platforms=(platform,)).as_text()
        sums[platform] = text.count("stablehlo.reduce(")
    assert sums["cuda"] == sums["rocm"] == 1 + 2  # the large array, and 64 and 5 small ones
    assert sums["cpu"] == sums["tpu"] >= len(tree) - 1  # all but the scalar


@pytest.mark.parametrize("limit", [1.0, 1e3])
def test_it_clips_as_optax_does(limit):
    tree = gradient()
    clip = optax.clip_by_global_norm(limit)
    expected, _ = jax.jit(clip.update)(tree, clip.init(tree))
    ours = jax.jit(clip_by_global_norm, static_argnums=1)(tree, limit)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert float(global_norm(ours)) <= limit * (1 + 1e-6) or limit > 1
