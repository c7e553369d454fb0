"""The attention modules (HGA, SE, SK and others), one Flax module per file.

Imports only platforms.py from the rest of the project. Start at hga.py. Attentions are registered by name in
registry.py.
"""

from hga_flax.attention.cbam import ConvolutionalBlockAttention
from hga_flax.attention.common import Source
from hga_flax.attention.eca import EfficientChannelAttention
from hga_flax.attention.gc import GlobalContext
from hga_flax.attention.ge import GatherExcite
from hga_flax.attention.hga import (
    HGA,
    ExcitationExploration,
    HierarchicalGlobalAveragePooling,
    MultiScaleFeatureExploitation,
)
from hga_flax.attention.identity_start import IdentityStart
from hga_flax.attention.nl import NonLocal
from hga_flax.attention.registry import (
    AttentionFactory,
    attention_factory,
    attention_names,
    attention_options,
    create_attention,
    register_attention,
    replaces_convolution,
    uses_source,
)
from hga_flax.attention.se import SqueezeExcitation
from hga_flax.attention.sk import SelectiveKernel

__all__ = [
    "HGA",
    "AttentionFactory",
    "ConvolutionalBlockAttention",
    "EfficientChannelAttention",
    "ExcitationExploration",
    "GatherExcite",
    "GlobalContext",
    "HierarchicalGlobalAveragePooling",
    "IdentityStart",
    "MultiScaleFeatureExploitation",
    "NonLocal",
    "SelectiveKernel",
    "Source",
    "SqueezeExcitation",
    "attention_factory",
    "attention_names",
    "attention_options",
    "create_attention",
    "register_attention",
    "replaces_convolution",
    "uses_source",
]
