"""Simple non-local block (NL).

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971.
Every position attends to all positions: queries, keys and values are 1x1 convolutions C -> C/r; the
softmax of the query-key products weights the values; a 1x1 convolution C/r -> C and BatchNorm (scale
initialised to zero) follow, and the result is added to the map. Cost: 4 C^2/r + 3 C/r + C + 2 C
parameters, 4 H W C^2/r + 2 (H W)^2 C/r multiply-accumulates: quadratic in the number of positions,
which the HGA paper argues against. The paper uses r = 2 and does not scale the products. timm uses
r = 8 and scales them by C^(-1/2); the default has timm's parameter count, 10,110,752 in ResNet-50.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import check_map, hidden_channels


class NonLocal(nn.Module):
    """NL, embedded Gaussian: adds a weighted mean over all positions to each position of `[B, H, W, channels]`.

    Attributes:
        channels: number of channels C of the map.
        ratio: reduction ratio; queries, keys and values have `channels // ratio` channels, at least one.
        scaled: multiply the products by `channels ** -0.5` before the softmax.
        zero_init: initialise BatchNorm's scale to zero, so that the block starts as the identity.
        dtype: dtype of the computation; parameters and softmax are float32.
        axis_name: mesh axis over which BatchNorm averages its batch statistics, or None.

    Raises:
        ValueError: the input does not have `channels` channels, or `ratio` is not positive.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> NonLocal(64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """

    channels: int
    ratio: int = 8
    scaled: bool = True
    zero_init: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def starts_as_identity(self) -> bool:
        """True if the block is the identity at initialisation."""
        return self.zero_init

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype."""
        check_map("NonLocal", x, self.channels)
        batch, height, width, _ = x.shape
        hidden = hidden_channels(self.channels, self.ratio)
        he = nn.initializers.he_normal()
        positions = x.reshape(batch, height * width, self.channels)
        query, key, value = (
            nn.Dense(hidden, dtype=self.dtype, kernel_init=he, name=name)(positions)
            for name in ("query", "key", "value")
        )
        wide = jnp.promote_types(x.dtype, jnp.float32)
        products = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=wide)
        weights = nn.softmax(products * (self.channels**-0.5 if self.scaled else 1.0), axis=-1)
        mixed = jnp.einsum("bqk,bkc->bqc", weights.astype(self.dtype), value)
        mixed = nn.Dense(self.channels, dtype=self.dtype, kernel_init=he, name="restore")(mixed)
        norm = nn.BatchNorm(
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
            scale_init=nn.initializers.zeros if self.zero_init else nn.initializers.ones,
            name="norm",
        )
        return x + norm(mixed, use_running_average=not train).reshape(x.shape).astype(x.dtype)
