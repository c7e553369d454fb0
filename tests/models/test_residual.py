import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.models import residual
from hga_flax.models.residual import relu_of_sum


@pytest.mark.parametrize("platform", ["default", "cuda"])
def test_values_and_gradients_are_those_of_the_plain_sum_also_at_zero(platform, monkeypatch):
    monkeypatch.setattr(residual.lax, "platform_dependent", lambda *arrays, **forms: forms[platform](*arrays))
    random = np.random.RandomState(0)
    x, y = np.round(random.standard_normal((2, 2, 5, 4, 3)))  # whose sums are often zero
    with jax.enable_x64(True):
        weights = jnp.asarray(random.standard_normal(x.shape))
        loss = lambda function: lambda x, y: (jnp.sin(function(x, y)) * weights).sum()
        ours, plain = (
            jax.jit(jax.value_and_grad(loss(function), argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(y))
            for function in (relu_of_sum, lambda x, y: nn.relu(x + y))
        )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("platform", "kept"), [("cpu", 0), ("tpu", 0), ("cuda", 1)])
def test_gpus_alone_keep_the_result(platform, kept):
    arguments = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 3))
    traced = jax.jit(jax.grad(lambda x, y: (relu_of_sum(x, y) ** 2).sum())).trace(*arguments)
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == kept
