"""Attention modules: every one maps `[B, H, W, C]` to the same shape."""

from hga_flax.attention.hga import (
    HGA,
    ExcitationExploration,
    HierarchicalGlobalAveragePooling,
    MultiScaleFeatureExploitation,
)
from hga_flax.attention.registry import (
    AttentionFactory,
    attention_factory,
    attention_names,
    attention_options,
    create_attention,
    register_attention,
)

__all__ = [
    "HGA",
    "AttentionFactory",
    "ExcitationExploration",
    "HierarchicalGlobalAveragePooling",
    "MultiScaleFeatureExploitation",
    "attention_factory",
    "attention_names",
    "attention_options",
    "create_attention",
    "register_attention",
]
