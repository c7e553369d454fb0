"""Global context (GC).

Cao, Xu, Lin, Wei, Hu: GCNet, ICCVW 2019, https://arxiv.org/abs/1904.11492. One attention map shared
by all positions (1x1 convolution to one channel, softmax over positions) averages the map into a
context vector; FC C -> C/r, LayerNorm, ReLU, FC C/r -> C transform it, and it is fused into the map.
Cost: 2 C^2/r + 3 C/r + 2 C + 1 parameters, 2 C^2/r + 2 C H W multiply-accumulates. The paper adds
the vector to every position, with r = 16 (r = 4 in some rows). timm gates the channels by its
sigmoid, with r = 8; the default has timm's parameter count, 5,065,776 in ResNet-50.
`fusion="add", ratio=16` is the paper's block.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.attention.common import at_least_float32, check_map, gated, global_mean, hidden_channels


class GlobalContext(nn.Module):
    """GC: fuses one attention-weighted mean of `[B, H, W, channels]` into every position.

    Attributes:
        channels: number of channels C of the map.
        ratio: reduction ratio; the transform has `channels // ratio` hidden units, at least one.
        fusion: "scale" multiplies by the sigmoid; "add" adds, with the last FC initialised to zero.
        pooling: "attention" for the softmax-weighted mean, "mean" for the plain one.
        dtype: dtype of the computation; parameters, softmax, pooling and gate are float32.
        axis_name: unused (no batch statistics); every attention takes it.

    Raises:
        ValueError: the input does not have `channels` channels, or an option is out of range.

    Examples:
        >>> x = jnp.ones((2, 8, 8, 64))
        >>> GlobalContext(64).init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 64)
    """

    channels: int
    ratio: int = 8
    fusion: str = "scale"
    pooling: str = "attention"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def starts_as_identity(self) -> bool:
        """True if the block is the identity at initialisation."""
        return self.fusion == "add"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`[B, H, W, channels]` -> the same shape and dtype."""
        check_map("GlobalContext", x, self.channels)
        if self.fusion not in ("scale", "add"):
            raise ValueError(f"fusion={self.fusion!r} is not 'scale' or 'add'")
        if self.pooling not in ("attention", "mean"):
            raise ValueError(f"pooling={self.pooling!r} is not 'attention' or 'mean'")
        he = nn.initializers.he_normal()
        if self.pooling == "attention":
            logits = nn.Dense(1, dtype=self.dtype, kernel_init=he, name="attend")(x)[..., 0]
            weights = nn.softmax(at_least_float32(logits), axis=(1, 2)).astype(self.dtype)
            wide = jnp.promote_types(x.dtype, jnp.float32)
            context = jnp.einsum("bhw,bhwc->bc", weights, x.astype(self.dtype), preferred_element_type=wide)
        else:
            context = global_mean(x)
        hidden = hidden_channels(self.channels, self.ratio)
        e = nn.Dense(hidden, dtype=self.dtype, kernel_init=he, name="squeeze")(context)
        e = nn.relu(nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(e))
        last_init = nn.initializers.zeros if self.fusion == "add" else nn.initializers.lecun_normal()
        e = nn.Dense(self.channels, dtype=self.dtype, kernel_init=last_init, name="excite")(e)[:, None, None, :]
        return gated(x, e) if self.fusion == "scale" else x + e.astype(x.dtype)
