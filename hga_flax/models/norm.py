"""BatchNorm that can also return the affine map it applied."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hga_flax.platforms import platform_dependent


class Affine(NamedTuple):
    """The per-channel map (x - center) * scale + offset; all fields are float32 `[C]`.

    `center` is treated as a constant; the gradient with respect to the mean flows through `offset`.
    """

    scale: jax.Array
    offset: jax.Array
    center: jax.Array


class BatchNorm(nn.Module):
    """Flax's BatchNorm over the last axis, with the same parameters, statistics and arithmetic.

    In addition, `return_affine` returns the normalisation as an affine map, so that later operations
    can be fused with it, see `hga_flax.attention.Source`.

    Attributes:
        use_running_average: normalise by the running statistics without updating them.
        momentum: decay rate of the running statistics.
        epsilon: added to the variance.
        dtype: dtype of the output; parameters and statistics are float32.
        axis_name: mesh axis over which the batch statistics are averaged, or None.
        scale_init: initialiser of the scale.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, return_affine: bool = False) -> Any:
        """`[..., C]` -> the same shape; with `return_affine` also returns the affine map that was applied."""
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
        scale = lax.rsqrt(var + self.epsilon) * self.param("scale", self.scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        center = mean if self.use_running_average else _center(mean)
        offset = bias if self.use_running_average else bias - (mean - center) * scale
        y = ((x - center) * scale + offset).astype(self.dtype)
        if not return_affine:
            return y
        center = lax.stop_gradient(center)
        return y, Affine(scale, bias - (mean - center) * scale, center)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes mean and variance over the batch in at least float32, with one pass and one collective."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(x.ndim - 1))
        moments = x.mean(axes), lax.square(x).mean(axes)
        if self.axis_name is not None and not self.is_initializing():
            moments = lax.pmean(jnp.stack(moments), self.axis_name)
        mean, mean_of_square = moments
        return mean, jnp.maximum(0.0, mean_of_square - lax.square(mean))  # rounding may make it negative


def _center(mean: jax.Array) -> jax.Array:
    """Returns what the map is centred by in training: the batch's mean, and on CPUs zero.

    XLA for CPUs keeps the centred map from the forward to the backward pass, as large as the map itself. Without
    it the rounding error grows with mean / deviation, and that of the variance with its square. Where the center is
    a constant, the gradient of the mean is a sum that the bias needs too, instead of one more over the map. Programs
    for TPUs do not gain by it.
    """
    return platform_dependent(mean, default=lax.stop_gradient, tpu=lambda mean: mean, cpu=jnp.zeros_like)


@contextlib.contextmanager
def frozen_statistics(active: bool = True) -> Iterator[None]:
    """Context in which every BatchNorm, including Flax's, uses its running statistics without updating them.

    This includes the norms of user-supplied attentions, which only receive `train`.

    Args:
        active: False disables the context.
    """

    def freeze(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if not isinstance(context.module, nn.BatchNorm | BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        if len(args) > 1:  # given by position
            return call(args[0], True, *args[2:], **kwargs)
        if "use_running_average" in kwargs:
            return call(*args, **kwargs | {"use_running_average": True})
        object.__setattr__(context.module, "use_running_average", True)  # set although frozen; only this call reads it
        return call(*args, **kwargs)

    with nn.intercept_methods(freeze) if active else contextlib.nullcontext():
        yield
