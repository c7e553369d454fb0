"""Size and cost of a network by part (stem, stages or blocks, head), with the attention's share of each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hga_flax.counting.complexity import operations_by_scope

ITSELF = "(itself)"  # convolutions and products that the network makes outside its modules


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a network: the stem, a stage, a block, the head, ...

    Attributes:
        name: common prefix of the names of its modules.
        output: shape of its last map or vector for one image; () if inference does not call it.
        parameters: number of parameters.
        attention: number of these parameters that belong to attentions.
        macs: multiply-accumulates of its convolutions and matrix products for one image, see `Counts`.
        attention_macs: number of these that belong to attentions.
    """

    name: str
    output: tuple[int, ...]
    parameters: int
    attention: int
    macs: int
    attention_macs: int


def part_of(module: str, *, blocks: bool = False) -> str:
    """Returns the part that a top-level module of a network belongs to: "stage1_block2" -> "stage1".

    With `blocks`, each block is a part of its own: "stage1_block2" stays, but "stem_conv" -> "stem".
    """
    part, _, inner = module.partition("_")
    return module if blocks and inner[-1:].isdecimal() else part


def model_parts(model: nn.Module, image_shape: Sequence[int], *, blocks: bool = False) -> list[Part]:
    """Returns the parts of a network in the order in which they are called, followed by those never called.

    Args:
        model: a network from `create_model`, or any Flax module that is called with (images, train). Everything
            below a module named "attention" counts as attention.
        image_shape: (height, width, channels) of one image.
        blocks: list the blocks of each stage instead of the stages.

    Raises:
        ValueError: see `complexity`.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda key, images: model.init(key, images, train=False), key, images)
    outputs: dict[str, tuple[int, ...]] = {}

    def watch(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if len(context.module.path) == 1 and context.method_name == "__call__":
            arrays = [leaf for leaf in jax.tree.leaves(result) if hasattr(leaf, "shape")]
            outputs[part_of(context.module.path[0], blocks=blocks)] = tuple(arrays[-1].shape[1:]) if arrays else ()
        return result

    with nn.intercept_methods(watch):
        scopes = operations_by_scope(
            lambda variables, images: model.apply(variables, images, train=False), variables, images
        )
    sizes: dict[str, list[int]] = {name: [0, 0, 0, 0] for name in outputs}
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        names = [entry.key for entry in path]
        _add(sizes, part_of(names[0], blocks=blocks), leaf.size, "attention" in names, 0)
    for scope, counts in scopes.items():
        if counts.conv_fc_macs:  # shorter scopes are the arithmetic of the module itself; our networks' has none
            part = part_of(scope[1], blocks=blocks) if len(scope) > 1 else ITSELF
            _add(sizes, part, counts.conv_fc_macs, "attention" in scope, 2)
    return [Part(name, outputs.get(name, ()), *size) for name, size in sizes.items()]


def _add(sizes: dict[str, list[int]], part: str, number: int, attention: bool, at: int) -> None:
    size = sizes.setdefault(part, [0, 0, 0, 0])
    size[at] += number
    size[at + 1] += number if attention else 0


def total(parts: Sequence[Part]) -> Part:
    """Returns the sum over all parts, with the output of the last part that inference calls."""
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("parameters", "attention", "macs", "attention_macs")
    }
    return Part("total", next((part.output for part in reversed(parts) if part.output), ()), **sums)


def parts_table(parts: Sequence[Part]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the header and rows of a table of the parts, with the total last."""
    header = ("part", "output", "parameters", "of which attention", "share", "MACs", "of which attention", "share")
    share = lambda part, whole: f"{part / max(whole, 1):.1%}"
    rows = [
        (
            part.name,
            "x".join(map(str, part.output)) or "-",
            f"{part.parameters:,}",
            f"{part.attention:,}",
            share(part.attention, part.parameters),
            f"{part.macs:,}",
            f"{part.attention_macs:,}",
            share(part.attention_macs, part.macs),
        )
        for part in (*parts, total(parts))
    ]
    return header, rows
