"""The tables of docs/attention.md, from the code: `python -m tests.docs_tables` writes them anew."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hga_flax.attention import attention_options, create_attention
from hga_flax.attention.eca import adaptive_kernel_size
from hga_flax.attention.registry import attention_factory, replaces_convolution
from hga_flax.counting.complexity import count_operations
from tests.commands import ROOT

PAGE = ROOT / "docs" / "attention.md"
STAGES = ((3, 56, 64), (4, 28, 128), (6, 14, 256), (3, 7, 512))  # ResNet-50: blocks, map, width (a quarter of C)

# Name: what it is, its paper, its parameters on C channels as text and as a function.
ATTENTIONS: dict[str, tuple[str, str, str, Callable[[int], int]]] = {
    "hga": (
        "Hierarchical global attention",
        "[Cao et al. 2020](https://doi.org/10.3390/fi12110178)",
        "2bC + 84b + 11/2 b², b = 32",
        lambda c: 2 * 32 * c + 84 * 32 + 11 * 32**2 // 2,
    ),
    "hga_table2": (
        "HGA as Table 2 of its paper counts it",
        "[our guess](paper.md#table-2s-hga-networks-cannot-be-recovered-to-the-digit)",
        "2bC + 2C + 176b + 11/2 b², b = 32",
        lambda c: 2 * 32 * c + 2 * c + 176 * 32 + 11 * 32**2 // 2,
    ),
    "se": (
        "Squeeze-and-excitation",
        "[Hu et al. 2018](https://arxiv.org/abs/1709.01507)",
        "2C²/r + C/r + C, r = 16",
        lambda c: 2 * c**2 // 16 + c // 16 + c,
    ),
    "sk": (
        "Selective kernels, in place of a 3x3 convolution",
        "[Li et al. 2019](https://arxiv.org/abs/1903.06586)",
        "18C²/G + 4C + 3Cd + 2d, d = max(C/16, 32)",
        lambda c: 18 * c**2 + 4 * c + 3 * c * max(c // 16, 32) + 2 * max(c // 16, 32),
    ),
    "eca": (
        "Efficient channel attention",
        "[Wang et al. 2020](https://arxiv.org/abs/1910.03151)",
        "k, odd, about log₂(C)/2",
        adaptive_kernel_size,
    ),
    "cbam": (
        "Convolutional block attention",
        "[Woo et al. 2018](https://arxiv.org/abs/1807.06521)",
        "2C²/r + 2k² + 2, r = 16, k = 7",
        lambda c: 2 * c**2 // 16 + 2 * 7**2 + 2,
    ),
    "gc": (
        "Global context",
        "[Cao et al. 2019](https://arxiv.org/abs/1904.11492)",
        "2C²/r + 3C/r + 2C + 1, r = 8",
        lambda c: 2 * c**2 // 8 + 3 * c // 8 + 2 * c + 1,
    ),
    "ge": (
        "Gather-excite",
        "[Hu et al. 2018](https://arxiv.org/abs/1810.12348)",
        "2C²/r + C/r + C, r = 16",
        lambda c: 2 * c**2 // 16 + c // 16 + c,
    ),
    "nl": (
        "Non-local block",
        "[Wang et al. 2018](https://arxiv.org/abs/1711.07971)",
        "4C²/r + 3C/r + 3C, r = 8",
        lambda c: 4 * c**2 // 8 + 3 * c // 8 + 3 * c,
    ),
}


def module_counts(name: str, channels: int, size: int) -> tuple[int, int]:
    """Returns parameters and multiply-accumulates of an attention on a map `[1, size, size, channels]`."""
    module, x = create_attention(name, channels), jnp.zeros((1, size, size, channels))
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    counts = count_operations(lambda variables, x: module.apply(variables, x), variables, x)
    return sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {}))), counts.conv_fc_macs


def in_resnet50(name: str) -> tuple[int, int]:
    """Returns what an attention adds to ResNet-50 at 224x224: parameters and multiply-accumulates."""
    total = [0, 0]
    for blocks, size, width in STAGES:
        if replaces_convolution(attention_factory(name)):
            parameters, macs = module_counts(name, width, size)
            convolution = 9 * width**2  # and its BatchNorm
            added = (parameters - convolution - 2 * width, macs - convolution * size**2)
        else:
            added = module_counts(name, 4 * width, size)
        total = [total[0] + blocks * added[0], total[1] + blocks * added[1]]
    return total[0], total[1]


def costs() -> str:
    """Returns the table of the attentions and what they cost."""
    rows = [
        "| name | attention | paper | parameters on C channels | in ResNet-50 | GMACs |",
        "|---|---|---|---|---:|---:|",
    ]
    for name, (title, paper, formula, _) in ATTENTIONS.items():
        parameters, macs = in_resnet50(name)
        rows.append(f"| `{name}` | {title} | {paper} | {formula} | {parameters:,} | {macs / 1e9:.4f} |")
    return "\n".join(rows)


def options() -> str:
    """Returns the table of the attentions' options with their defaults."""
    rows = ["| name | module | options |", "|---|---|---|"]
    for name in ATTENTIONS:
        module = type(create_attention(name, 64)).__name__
        listed = ", ".join(f"`{option}={default!r}`" for option, default in attention_options(name).items())
        rows.append(f"| `{name}` | [{module}](api.md#hga_flax.{module}) | {listed} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """Returns the page with its tables made anew, each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, table in (("costs", costs), ("options", options)):
        page, found = re.subn(
            rf"(<!-- {name} -->\n\n).*?(\n\n<!-- end -->)", lambda m, t=table: m[1] + t() + m[2], page, flags=re.DOTALL
        )
        assert found == 1, name
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
