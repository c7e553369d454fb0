"""Image classification with Hierarchical Global Attention in JAX/Flax.

What is imported from here is the library: the attentions, the networks, and what reads a run's
checkpoint. `create_attention` and `create_model` make them by name.
"""

import importlib
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

STARTED = time.monotonic()  # as good as the start of the process, for what a command says of its start-up

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

# Where a name lives, if not in hga_flax.attention.
_HOMES = {
    "create_model": "hga_flax.models",
    "model_names": "hga_flax.models",
    "model_options": "hga_flax.models",
    "Predictor": "hga_flax.inference.predictor",
    "restore_workdir": "hga_flax.training.restore",
}


def __getattr__(name: str) -> Any:
    """Imports JAX and Flax at the first use of a name, so that `python -m hga_flax --help` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'hga_flax' has no attribute '{name}'")
    try:
        return getattr(importlib.import_module(_HOMES.get(name, "hga_flax.attention")), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"hga_flax.{name}: {error.name} is not installed; pip install 'hga-flax[train]'") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
