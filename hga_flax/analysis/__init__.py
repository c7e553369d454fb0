"""What a network costs, and the paper's tables beside ours."""

from hga_flax.analysis.complexity import Complexity, complexity

__all__ = ["Complexity", "complexity"]
