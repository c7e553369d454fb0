"""Image classification with Hierarchical Global Attention in JAX/Flax."""

import time
from typing import TYPE_CHECKING, Any

from hga_flax.version import __version__

if TYPE_CHECKING:
    from hga_flax.attention import HGA, create_attention, register_attention
    from hga_flax.models import create_model

STARTED = time.monotonic()  # as good as the start of the process, for what a command says of its start-up

__all__ = ["HGA", "__version__", "create_attention", "create_model", "register_attention"]


def __getattr__(name: str) -> Any:
    """Imports JAX and Flax at the first use of a name, so that `python -m hga_flax --help` is quick."""
    if name in ("HGA", "create_attention", "register_attention"):
        from hga_flax import attention as home
    elif name == "create_model":
        from hga_flax import models as home
    else:
        raise AttributeError(f"module 'hga_flax' has no attribute '{name}'")
    return getattr(home, name)
