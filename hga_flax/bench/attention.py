"""Times each attention alone on the feature maps of ResNet-50's four stages; the attentions take turns."""

from collections.abc import Callable, Sequence
from typing import Any

from hga_flax.bench.race import race
from hga_flax.bench.step import parse_attention
from hga_flax.errors import UserError

STAGES = ((56, 256), (28, 512), (14, 1024), (7, 2048))  # (height and width, channels) of the blocks' outputs
WIDTH = 4  # ratio of a block's output channels to those of its 3x3 convolution


def bench_attention(
    names: Sequence[str] | None, batch: int, dtype: str, rounds: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Times attentions: the forward pass alone, and with the gradients of parameters and input.

    Args:
        names: registered names and "hga-conv", HGA's convolution form; None means all.
        batch: batch size.
        dtype: data type of the feature maps and the computation.
        rounds: number of measurements of each attention.
        log: called with progress lines.

    Returns:
        Rows with `attention`, `height`, `width`, `channels` (SK replaces a 3x3 convolution and has
        a quarter of them) and `params`; and, each prefixed with `forward` or `gradient` (which
        includes the forward pass), `_ms`, `_fastest_ms`, `_spread`, `_bytes` (accessed, as counted by
        XLA) and `_ratio`: time relative to SE, or to the first attention if SE is not among them.

    Raises:
        UserError: an unknown attention.
    """
    from hga_flax.attention import attention_names
    from hga_flax.attention.registry import check_attention

    known = [*attention_names(), "hga-conv"]
    names = known if names is None else list(names)
    for name in names:
        try:
            check_attention(name, ["hga-conv"])
        except ValueError as error:
            raise UserError(f"--attentions: {error}") from None
    names = sorted(names, key=lambda name: name != "se")  # the others are compared with the first
    rows = []
    for size, channels in STAGES:
        log(f"{size}x{size}x{channels}: {', '.join(names)} ...")
        built = [_build(name, size, channels, batch, dtype) for name in names]
        for kind in ("forward", "gradient"):
            timings = race([works[kind][0] for _, works in built], rounds)
            for (row, works), timing in zip(built, timings, strict=True):
                row[f"{kind}_ms"] = timing.median * 1e3
                row[f"{kind}_fastest_ms"] = timing.fastest * 1e3
                row[f"{kind}_spread"] = timing.spread
                row[f"{kind}_bytes"] = works[kind][1]
                row[f"{kind}_ratio"] = timing.ratio_to_first
        rows += [row for row, _ in built]
    return rows


def _build(name: str, size: int, channels: int, batch: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns an attention's row and, for both kinds, (function to time, bytes it accesses)."""
    import jax
    import jax.numpy as jnp

    from hga_flax.attention import attention_factory, replaces_convolution
    from hga_flax.counting.compiled import cost

    registered, options = parse_attention(name)
    factory = attention_factory(registered, **options)
    in_place = replaces_convolution(factory)
    channels //= WIDTH if in_place else 1
    module = factory(channels, dtype=jnp.dtype(dtype), **({"stride": 1, "replaced_groups": 1} if in_place else {}))
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = (jax.random.normal(key, (batch, size, size, channels), dtype) for key in keys[:2])
    variables = jax.jit(module.init)(keys[2], x)
    params = variables.get("params", {})
    fixed = {collection: values for collection, values in variables.items() if collection == "batch_stats"}

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": params} | fixed, x, True, mutable=["batch_stats"])[0]

    def gradient(params: Any, x: jax.Array, g: jax.Array) -> Any:
        y, back = jax.vjp(forward, params, x)
        return y, back(g)

    works = {}
    for kind, function, arguments in (("forward", forward, (params, x)), ("gradient", gradient, (params, x, g))):
        compiled = jax.jit(function).lower(*arguments).compile()
        works[kind] = (_repeat(compiled, arguments), cost(compiled).bytes_accessed)
        works[kind][0](1)
    row = {"attention": name, "height": size, "width": size, "channels": channels}
    return row | {"params": sum(leaf.size for leaf in jax.tree.leaves(params))}, works


def _repeat(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[int], None]:
    import jax

    def work(times: int) -> None:
        for _ in range(times):
            result = compiled(*arguments)
        jax.block_until_ready(result)

    return work


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a printable table."""
    reference = rows[0]["attention"]
    lines = [
        f"{'map':>13} {'attention':10} {'params':>10} {'forward ms':>11} {'spread':>7} {'MB':>9} {'ratio':>7}"
        f" {'+ backward':>11} {'spread':>7} {'MB':>9} {'ratio':>7}"
    ]
    for row in rows:
        line = f"{row['height']}x{row['width']}x{row['channels']}"
        line = f"{line:>13} {row['attention']:10} {row['params']:>10,}"
        for kind in ("forward", "gradient"):
            line += (
                f" {row[f'{kind}_ms']:>11.3f} {row[f'{kind}_spread']:>7.1%} {row[f'{kind}_bytes'] / 1e6:>9.1f}"
                f" {row[f'{kind}_ratio']:>7.2f}"
            )
        lines.append(line)
    return "\n".join([*lines, f"MB: accessed, as XLA counts; ratio: of the times to {reference}'s, turn by turn"])
