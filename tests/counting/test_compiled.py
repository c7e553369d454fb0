import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hga_flax.counting.compiled import collectives, cost
from tests.training import tiny

TEXT = """
  %a = f32[2,64]{1,0:T(2,128)} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%region
  %b = (bf16[1,1,64,256]{3,2,1,0}, f32[10]{0}) all-reduce(%y, %z), channel_id=2, to_apply=%region
  %c = (f32[4]{0}, f32[32]{0}) all-gather-start(%v), dimensions={0}
  %d = f32[32]{0} all-gather-done(%c)
  %k = ((f32[8]{0}, f32[4]{0}), (f32[16]{0:T(8,128)}, f32[8]{0})) all-gather-start(%x, %y), dimensions={0}
  ROOT %e = (s8[16]{0}, s8[16]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w)
  %f = f32[8]{0} add(%all-reduce.1, %g), metadata={op_name="all-reduce(x)"}
  %h = f8e4m3fn[8]{0} all-to-all(%i), dimensions={0}
"""


def test_collectives_of_a_text():
    assert collectives(TEXT) == {
        "all-reduce": {"count": 2, "bytes": 2 * 64 * 4 + 64 * 256 * 2 + 40},
        "all-gather": {"count": 2, "bytes": 128 + 96},
        "collective-permute": {"count": 1, "bytes": 16},
        "all-to-all": {"count": 1, "bytes": 8},
    }


def test_the_cost_of_a_product_and_a_sum_over_devices():
    def function(x, w):
        return jax.lax.psum(x @ w, "data")

    split, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.jit(jax.shard_map(function, mesh=tiny.mesh(4), in_specs=(split, whole), out_specs=whole))
    result = cost(mapped.lower(jnp.ones((32, 64)), jnp.ones((64, 16))).compile())
    assert result.flops == pytest.approx(2 * 8 * 64 * 16, rel=0.05)  # of one device's eight rows
    arrays = 4 * np.array([8 * 64, 64 * 16, 8 * 16])
    assert arrays.sum() <= result.bytes_accessed <= 2 * arrays.sum()
    assert arrays.sum() <= result.peak_memory_bytes <= 2 * arrays.sum()
    assert result.collectives == {"all-reduce": {"count": 1, "bytes": 8 * 16 * 4}}


def test_peak_memory_holds_what_is_kept_for_the_backward_pass():
    """Twenty maps of 1 MB live at once, though arguments and results are small."""

    def loss(w):
        x = jnp.ones((1024, 256))
        for _ in range(20):
            x = jnp.sin(x @ w)
        return x.sum()

    result = cost(jax.jit(jax.grad(loss)).lower(jnp.ones((256, 256))).compile())
    assert 15e6 < result.peak_memory_bytes < 100e6
