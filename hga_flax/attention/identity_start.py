"""Adds an attention to a pretrained network without changing its output at the start.

A freshly initialised gate between 0 and 1 would change every map of a trained network at once. Here
a learned share per channel, initialised to zero, blends the attention in:
y = x + share * (attention(x) - x). For a gate s this is x * (1 + share * (s - 1)); with a share of
one it is the attention itself. The network starts out exactly as the one without attention; the
first step updates only the shares, later steps update everything. The idea is that of ReZero
(Bachlechner et al., https://arxiv.org/abs/2003.04887) and LayerScale (Touvron et al.,
https://arxiv.org/abs/2103.17239), which has one factor per channel. Cost: C parameters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import Source, at_least_float32, check_result

SHARE = "identity_start_share"  # name of the added parameter


class IdentityStart(nn.Module):
    """Blends an attention into `[B, H, W, channels]` by shares initialised to zero.

    The attention's own variables keep their names; only the parameter `identity_start_share` `[C]`
    is added. An attention that is the identity at initialisation (`starts_as_identity`) is used unchanged.

    Attributes:
        channels: number of channels C of the map.
        attention: factory of an attention that follows a block's last norm.
        dtype: passed to the attention; the shares are float32.
        axis_name: passed to the attention.
    """

    channels: int
    attention: Any
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        self.inner = self.attention(self.channels, dtype=self.dtype, axis_name=self.axis_name)
        nn.share_scope(self, self.inner)
        if not getattr(self.inner, "starts_as_identity", False):
            self.share = self.param(SHARE, nn.initializers.zeros, (self.channels,), jnp.float32)

    def __call__(self, x: jax.Array, train: bool = False, source: Source | None = None) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype."""
        if getattr(self.inner, "starts_as_identity", False):
            return self._attended(x, train, source)
        if source is not None and getattr(self.inner, "gates_channels", False):
            return self._attended(x, train, source._replace(share=self.share))
        wide = at_least_float32(x)
        return (wide + self.share * (at_least_float32(self._attended(x, train, source)) - wide)).astype(x.dtype)

    def _attended(self, x: jax.Array, train: bool, source: Source | None) -> jax.Array:
        y = self.inner(x, train) if source is None else self.inner(x, train, source)
        return check_result(self.inner, y, x.shape)
