"""Image classification with Hierarchical Global Attention in JAX/Flax."""

from hga_flax.attention import HGA, create_attention
from hga_flax.models import create_model
from hga_flax.version import __version__

__all__ = ["HGA", "__version__", "create_attention", "create_model"]
