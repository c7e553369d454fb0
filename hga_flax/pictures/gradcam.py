"""Grad-CAM: shows where in an image the network found evidence for a class.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization,
ICCV 2017, https://arxiv.org/abs/1610.02391, Eqs. 1-2, on the output map of the last block. The network
is not changed: the gradient is taken with respect to a zero that an interceptor adds to this map.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hga_flax.errors import UserError
from hga_flax.models.norm import BatchNorm


class Seen(NamedTuple):
    """Results of one forward and backward pass on B images.

    Attributes:
        logits: `[B, classes]`.
        classes: int `[B]`, the explained classes.
        cams: `[B, h, w]`, the Grad-CAM maps, never negative.
        layer: name of the module that returned the last map, `[B, h, w, C]`.
        intermediates: nested dictionary of everything the modules sowed.
    """

    logits: np.ndarray
    classes: np.ndarray
    cams: np.ndarray
    layer: str
    intermediates: dict[str, Any]


def last_map(model: nn.Module, variables: Any, images: Any) -> tuple[str, tuple[int, ...]]:
    """Returns the name and shape of the last map `[B, h, w, C]` returned by a top-level module of the network.

    Skips a norm before the pooling, such as that of pre-activation networks.

    Raises:
        UserError: no module returns a map.
    """
    found: list[tuple[str, tuple[int, ...]]] = []

    def watch(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if _at_top(context) and not isinstance(context.module, nn.BatchNorm | BatchNorm) and jnp.ndim(result) == 4:
            found.append((context.module.path[0], result.shape))
        return result

    with nn.intercept_methods(watch):
        # A new function each time: JAX would otherwise reuse a trace made without the interceptor.
        jax.eval_shape(lambda variables, images: model.apply(variables, images, train=False), variables, images)
    if not found:
        raise UserError(f"{type(model).__name__}: none of its modules returns a map, which Grad-CAM needs")
    return found[-1]


def _at_top(context: nn.module.InterceptorContext) -> bool:
    return len(context.module.path) == 1 and context.method_name == "__call__"


def look(model: nn.Module, variables: Any, images: Any, classes: Any = None) -> Seen:
    """Runs the network on images and explains one class for each.

    Args:
        model: a network from `create_model`, or any Flax module called with (images, train).
        variables: `params` and `batch_stats`.
        images: `[B, H, W, C]`, normalised as in evaluation.
        classes: int `[B]`; None explains the predicted classes.

    Raises:
        UserError: no top-level module returns a map.
    """
    layer, shape = last_map(model, variables, images)

    def score(added: jax.Array, variables: Any, images: jax.Array, classes: jax.Array | None) -> tuple[jax.Array, Any]:
        maps: list[jax.Array] = []

        def add(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            result = call(*args, **kwargs)
            if _at_top(context) and context.module.path[0] == layer:
                maps.append(result.astype(jnp.float32))
                result = (maps[-1] + added).astype(result.dtype)
            return result

        with nn.intercept_methods(add):
            logits, sown = model.apply(variables, images, train=False, mutable=["intermediates"])
        classes = logits.argmax(axis=-1) if classes is None else classes
        # In inference the images are independent, so the gradient of the sum holds the gradient of each.
        chosen = jnp.take_along_axis(logits, classes[:, None], axis=-1).sum()
        return chosen, (logits, classes, maps[-1], sown.get("intermediates", {}))

    @jax.jit
    def explain(variables: Any, images: jax.Array, classes: jax.Array | None) -> tuple[Any, ...]:
        gradient, (logits, classes, a, sown) = jax.grad(score, has_aux=True)(
            jnp.zeros(shape, jnp.float32), variables, images, classes
        )
        weights = gradient.mean(axis=(1, 2), keepdims=True)  # Eq. 1
        return logits, classes, nn.relu((weights * a).sum(axis=-1)), sown  # Eq. 2

    classes = None if classes is None else jnp.asarray(classes)
    logits, classes, cams, sown = jax.device_get(explain(variables, images, classes))
    return Seen(logits, classes, cams, layer, sown)
