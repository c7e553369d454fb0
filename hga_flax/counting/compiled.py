"""Cost of a compiled program per device as reported by its compiler: FLOPs, bytes, memory, collectives."""

import dataclasses
import re
from collections import Counter
from typing import Any

import jax

from hga_flax.counting.program_text import Program, result_bytes

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip
SMALL = 1_000_000  # bytes below which launching a kernel may cost more than its work
_CALL = re.compile(rf"^\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one execution of a program, per device.

    Attributes:
        flops: number of multiplications and additions.
        bytes_accessed: bytes that its fused operations read and write, each counted in full. For TPUs this is XLA's own
            count: it includes values in on-chip memory (VMEM), and again what moves them there and back.
        peak_memory_bytes: peak memory in use, including arguments and results.
        collectives: by kind, their number (`count`) and the size of their results (`bytes`).
        kernels: number of kernel executions, counting every iteration of a loop.
        small_kernels: number of these that move less than 1 MB.
        custom_calls: number of calls to code outside XLA, by target.
        main_memory_bytes: bytes read from and written to main memory (HBM), as `program_text` counts them; None if they
            were not counted.
    """

    flops: float
    bytes_accessed: float
    peak_memory_bytes: int
    collectives: dict[str, dict[str, int]]
    kernels: int = 0
    small_kernels: int = 0
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    main_memory_bytes: int | None = None


def cost(compiled: jax.stages.Compiled) -> Cost:
    """Returns the cost of a compiled program; for GPUs, bytes and FLOPs come from `program_text`."""
    analysis, memory, text = compiled.cost_analysis() or {}, compiled.memory_analysis(), compiled.as_text()
    kernels = Program(text).kernels()
    main_memory = sum(kernel.bytes for kernel in kernels)
    if _for_gpus(compiled):
        analysis = {
            "flops": sum(kernel.times * kernel.flops for kernel in kernels),
            "bytes accessed": main_memory,
        }
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if peak < sizes + memory.temp_size_in_bytes / 2:  # the CPU compiler omits temporaries
        peak = sizes + memory.temp_size_in_bytes
    calls = Counter()
    for kernel in kernels:
        if kernel.calls:
            calls[kernel.kind] += kernel.times
    return Cost(
        flops=float(analysis.get("flops", 0.0)),  # missing if the program has none
        bytes_accessed=float(analysis.get("bytes accessed", 0.0)),
        peak_memory_bytes=int(peak),
        collectives=collectives(text),
        kernels=sum(kernel.times for kernel in kernels),
        small_kernels=sum(kernel.times for kernel in kernels if kernel.read + kernel.written < SMALL),
        custom_calls=dict(calls),
        main_memory_bytes=main_memory,
    )


def heaviest(compiled: jax.stages.Compiled, count: int) -> list[dict[str, Any]]:
    """Returns the `count` kernels that move the most bytes: `bytes`, `kind`, `operation`, `source`, `name` of each."""
    kernels = sorted(Program(compiled.as_text()).kernels(), key=lambda kernel: -kernel.bytes)[:count]
    return [
        {name: getattr(kernel, name) for name in ("bytes", "kind", "operation", "source", "name")} for kernel in kernels
    ]


def _for_gpus(compiled: jax.stages.Compiled) -> bool:
    devices = {device for sharding in jax.tree.leaves(compiled.input_shardings) for device in sharding.device_set}
    return any(device.platform in ("gpu", "cuda", "rocm") for device in devices)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Counts the collectives in the text of an optimised program (HLO) and the bytes of their results.

    An asynchronous collective, a pair of start and done operations, counts once, with the bytes of its result.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind, start in _CALL.findall(text):
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += result_bytes(result, kind + start)
    return found
