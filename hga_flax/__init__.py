"""Image classification with Hierarchical Global Attention in JAX/Flax."""

from hga_flax.attention import HGA, create_attention
from hga_flax.models import create_model

__version__ = "0.1.0"
__all__ = ["HGA", "create_attention", "create_model"]
