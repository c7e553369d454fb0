"""The networks, each with one hook for an attention in every block, and the layers that they share.

Imports attention/. Start at resnet.py; registry.py names them all.
"""

from hga_flax.models.registry import CIFAR_PATTERN, WIDE_PATTERN, create_model, model_names, model_options

__all__ = ["CIFAR_PATTERN", "WIDE_PATTERN", "create_model", "model_names", "model_options"]
