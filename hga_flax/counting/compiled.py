"""What a compiled program costs on each device, as its compiler counts it: FLOPs, bytes, memory, collectives."""

import dataclasses
import re
from collections import Counter
from typing import Any

import jax

from hga_flax.counting.program_text import Program, array_bytes

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
SMALL = 1_000_000  # bytes below which a kernel's launch may cost more than what it does
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
        kernels: operations that run on their own, those of loops as often as they run.
        small_kernels: those of them that move under 1 MB.
        custom_calls: calls of what is not XLA's own, by target: how many.
    """

    flops: float
    bytes_accessed: float
    peak_memory_bytes: int
    collectives: dict[str, dict[str, int]]
    kernels: int = 0
    small_kernels: int = 0
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)


def cost(compiled: jax.stages.Compiled) -> Cost:
    """Returns what a compiled program costs; for GPUs bytes and FLOPs are those of `program_text`."""
    analysis, memory, text = compiled.cost_analysis() or {}, compiled.memory_analysis(), compiled.as_text()
    kernels = Program(text).kernels()
    if _for_gpus(compiled):
        analysis = {
            "flops": sum(kernel.times * kernel.flops for kernel in kernels),
            "bytes accessed": sum(kernel.bytes for kernel in kernels),
        }
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if peak < sizes + memory.temp_size_in_bytes / 2:  # CPU's compiler leaves out all that is temporary
        peak = sizes + memory.temp_size_in_bytes
    calls = Counter()
    for kernel in kernels:
        if kernel.calls:
            calls[kernel.kind] += kernel.times
    return Cost(
        flops=float(analysis.get("flops", 0.0)),  # absent where there is none
        bytes_accessed=float(analysis.get("bytes accessed", 0.0)),
        peak_memory_bytes=int(peak),
        collectives=collectives(text),
        kernels=sum(kernel.times for kernel in kernels),
        small_kernels=sum(kernel.times for kernel in kernels if kernel.read + kernel.written < SMALL),
        custom_calls=dict(calls),
    )


def heaviest(compiled: jax.stages.Compiled, count: int) -> list[dict[str, Any]]:
    """Returns the kernels that move the most bytes: `bytes`, `kind`, `operation`, `source`, each kernel's `name`."""
    kernels = sorted(Program(compiled.as_text()).kernels(), key=lambda kernel: -kernel.bytes)[:count]
    return [
        {name: getattr(kernel, name) for name in ("bytes", "kind", "operation", "source", "name")} for kernel in kernels
    ]


def _for_gpus(compiled: jax.stages.Compiled) -> bool:
    devices = {device for sharding in jax.tree.leaves(compiled.input_shardings) for device in sharding.device_set}
    return any(device.platform in ("gpu", "cuda", "rocm") for device in devices)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Counts the collectives in the text of an optimised program (HLO), and the bytes of their results.

    One that starts and ends as two operations counts once, with what it delivers.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind, start in _CALL.findall(text):
        arrays = [array_bytes(*array) for array in _ARRAY.findall(result)]
        if start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[1:2]  # (what goes in, what comes out, handles)
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(arrays)
    return found
