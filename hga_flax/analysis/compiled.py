"""What a compiled program costs on each device, as its compiler counts it: FLOPs, bytes, memory, collectives."""

import dataclasses
import math
import re

import jax

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip
_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALL = re.compile(rf"^\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of a program, on each device.

    Attributes:
        flops: multiplications and additions.
        bytes_accessed: what its fused operations read and write, each counted whole; the traffic
            with the main memory where no value stays in the chip's own.
        peak_memory_bytes: most memory in use at once, arguments and results included.
        collectives: by kind, how many (`count`) and the `bytes` of their results.
    """

    flops: float
    bytes_accessed: float
    peak_memory_bytes: int
    collectives: dict[str, dict[str, int]]


def cost(compiled: jax.stages.Compiled) -> Cost:
    """Returns what a compiled program costs."""
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if peak < sizes + memory.temp_size_in_bytes / 2:  # CPU's compiler leaves out all that is temporary
        peak = sizes + memory.temp_size_in_bytes
    return Cost(
        flops=float(analysis.get("flops", 0.0)),  # absent where there is none
        bytes_accessed=float(analysis.get("bytes accessed", 0.0)),
        peak_memory_bytes=int(peak),
        collectives=collectives(compiled.as_text()),
    )


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Counts the collectives in the text of an optimised program (HLO), and the bytes of their results.

    One that starts and ends as two operations counts once, with what it delivers.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind, start in _CALL.findall(text):
        arrays = [_array_bytes(*array) for array in _ARRAY.findall(result)]
        if start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[1:2]  # (what goes in, what comes out, handles)
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(arrays)
    return found


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"^f(\d+).*|.*", r"\1", dtype) or 0)  # f8e4m3fn and its like
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8
