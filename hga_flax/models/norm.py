"""BatchNorm that also tells which affine map it applied."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Affine(NamedTuple):
    """The map (x - center) * scale + offset per channel, all float32 `[C]`.

    `center` is a constant: through `offset` the gradients are those with respect to the mean.
    """

    scale: jax.Array
    offset: jax.Array
    center: jax.Array


class BatchNorm(nn.Module):
    """Flax's BatchNorm of the last axis: the same parameters, statistics and arithmetic.

    Beyond it, `return_affine` hands over the affine map that the normalisation is, so that what
    follows can be computed together with it, see `hga_flax.attention.Source`.

    Attributes:
        use_running_average: normalise by the running statistics and leave them as they are.
        momentum: share of the running statistics that stays at each step.
        epsilon: added to the variance.
        dtype: of the result; parameters and statistics are float32.
        axis_name: mesh axis over which the batch statistics are averaged, or None.
        scale_init: initial scale.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, return_affine: bool = False) -> Any:
        """`[..., C]` -> the same shape, or with `return_affine` that and the map which was applied."""
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if self.use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = self._batch_statistics(x)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        scale = lax.rsqrt(var + self.epsilon) * self.param("scale", self.scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        y = ((x - mean) * scale + bias).astype(self.dtype)
        if not return_affine:
            return y
        center = lax.stop_gradient(mean)
        return y, Affine(scale, bias - (mean - center) * scale, center)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance over the batch, at least in float32, by one pass and one collective."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(x.ndim - 1))
        moments = x.mean(axes), lax.square(x).mean(axes)
        if self.axis_name is not None and not self.is_initializing():
            moments = lax.pmean(jnp.stack(moments), self.axis_name)
        mean, mean_of_square = moments
        return mean, jnp.maximum(0.0, mean_of_square - lax.square(mean))  # rounding may leave it below zero


@contextlib.contextmanager
def frozen_statistics(active: bool = True) -> Iterator[None]:
    """Inside, every BatchNorm, Flax's too, goes by its running statistics and leaves them, also in training.

    It reaches the norms of attentions that are not the project's, which are told no more than `train`.

    Args:
        active: False changes nothing.
    """

    def freeze(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if not isinstance(context.module, nn.BatchNorm | BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        if "use_running_average" in kwargs:
            return call(*args, **kwargs | {"use_running_average": True})
        object.__setattr__(context.module, "use_running_average", True)  # a bound module is frozen, this call its own
        return call(*args, **kwargs)

    with nn.intercept_methods(freeze) if active else contextlib.nullcontext():
        yield
