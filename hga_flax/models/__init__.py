"""The networks, each with a hook for an attention in every block, and their shared layers.

Imports attention/. Start at resnet.py; registry.py lists them all.
"""

from hga_flax.models.registry import CIFAR_PATTERN, WIDE_PATTERN, create_model, model_names, model_options

__all__ = ["CIFAR_PATTERN", "WIDE_PATTERN", "create_model", "model_names", "model_options"]
