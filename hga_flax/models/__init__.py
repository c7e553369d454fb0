"""Networks, each with one hook for an attention in every block."""

from hga_flax.models.registry import CIFAR_PATTERN, WIDE_PATTERN, create_model, model_names, model_options

__all__ = ["CIFAR_PATTERN", "WIDE_PATTERN", "create_model", "model_names", "model_options"]
