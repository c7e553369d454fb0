"""An attention that a network starts without: what pretrained weights are given without harm.

A gate between 0 and 1 changes every map of a trained network at once. Here the attention acts by a
share of each channel that is learned and starts at zero, y = x + share * (attention(x) - x): for a
gate s that is x * (1 + share * (s - 1)), and a share of one is the attention itself. At the start
the network is exactly the one without attention; the first step moves the shares, the following
ones everything. After ReZero (Bachlechner et al., https://arxiv.org/abs/2003.04887) and LayerScale
(Touvron et al., https://arxiv.org/abs/2103.17239), which has one factor for each channel. Cost: C
parameters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import Source, at_least_float32

SHARE = "identity_start_share"  # the parameter, beside the attention's own


class IdentityStart(nn.Module):
    """Mixes an attention into `[B, H, W, channels]` by shares that start at zero.

    The attention's own variables keep their names: only the parameter `identity_start_share` `[C]`
    is new. An attention that starts as the identity by itself (`starts_as_identity`) is left as it is.

    Attributes:
        channels: C of the map.
        attention: the factory of an attention that follows a block's last norm.
        dtype: given to the attention; the shares are float32.
        axis_name: given to the attention.
    """

    channels: int
    attention: Any
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        self.inner = self.attention(self.channels, dtype=self.dtype, axis_name=self.axis_name)
        nn.share_scope(self, self.inner)
        if not getattr(self.inner, "starts_as_identity", False):
            self.share = self.param(SHARE, nn.initializers.zeros, (self.channels,))

    def __call__(self, x: jax.Array, train: bool = False, source: Source | None = None) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype."""
        if getattr(self.inner, "starts_as_identity", False):
            return self._attended(x, train, source)
        if source is not None and getattr(self.inner, "gates_channels", False):
            return self._attended(x, train, source._replace(share=self.share))
        wide = at_least_float32(x)
        return (wide + self.share * (at_least_float32(self._attended(x, train, source)) - wide)).astype(x.dtype)

    def _attended(self, x: jax.Array, train: bool, source: Source | None) -> jax.Array:
        return self.inner(x, train) if source is None else self.inner(x, train, source)
