"""Image classification with Hierarchical Global Attention in JAX/Flax.

The public names are the attentions, the networks, and the functions that load a run's checkpoint.
`create_attention` and `create_model` create attentions and networks by name.

Examples:
    >>> import jax
    >>> from hga_flax import HGA
    >>> HGA(64).init_with_output(jax.random.key(0), jax.numpy.ones((2, 8, 8, 64)))[0].shape
    (2, 8, 8, 64)
"""

import importlib
import logging
import time
from typing import TYPE_CHECKING, Any

from hga_flax.version import __version__

if TYPE_CHECKING:
    from hga_flax.attention import (
        HGA,
        ConvolutionalBlockAttention,
        EfficientChannelAttention,
        ExcitationExploration,
        GatherExcite,
        GlobalContext,
        HierarchicalGlobalAveragePooling,
        MultiScaleFeatureExploitation,
        NonLocal,
        SelectiveKernel,
        SqueezeExcitation,
        attention_names,
        attention_options,
        create_attention,
        register_attention,
    )
    from hga_flax.inference.predictor import Predictor
    from hga_flax.models import create_model, model_names, model_options
    from hga_flax.training.restore import restore_workdir

STARTED = time.monotonic()  # close enough to the start of the process to report a command's start-up time

__all__ = [
    "HGA",
    "ConvolutionalBlockAttention",
    "EfficientChannelAttention",
    "ExcitationExploration",
    "GatherExcite",
    "GlobalContext",
    "HierarchicalGlobalAveragePooling",
    "MultiScaleFeatureExploitation",
    "NonLocal",
    "Predictor",
    "SelectiveKernel",
    "SqueezeExcitation",
    "__version__",
    "attention_names",
    "attention_options",
    "create_attention",
    "create_model",
    "model_names",
    "model_options",
    "register_attention",
    "restore_workdir",
]

# The module of each name that is not in hga_flax.attention.
_HOMES = {
    "create_model": "hga_flax.models",
    "model_names": "hga_flax.models",
    "model_options": "hga_flax.models",
    "Predictor": "hga_flax.inference.predictor",
    "restore_workdir": "hga_flax.training.restore",
}


def __getattr__(name: str) -> Any:
    """Imports JAX and Flax when a name is first used, so that `python -m hga_flax --help` is fast."""
    if name not in __all__:
        raise AttributeError(f"module 'hga_flax' has no attribute '{name}'")
    handlers = logging.root.handlers[:]
    try:
        return getattr(importlib.import_module(_HOMES.get(name, "hga_flax.attention")), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"hga_flax.{name}: {error.name} is not installed; pip install '.[train]' in the clone"
        ) from error
    finally:  # Orbax adds one as it is imported, after which the program's own logging.basicConfig would do nothing
        logging.root.handlers[:] = handlers


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
