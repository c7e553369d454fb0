"""Counts the bytes that each kernel of an optimised program moves, from the program's text (XLA's HLO).

XLA's own cost analysis reports nothing for GPUs. Here every top-level operation of the program is a kernel that reads
each operand once and writes its results, each counted in full. Simplifications:

* Caches are ignored: a value that stays in a cache counts as main-memory traffic. What the compiler itself places in
  on-chip memory (a TPU's VMEM: its layout names a memory space other than 0) does not count.
* If a fused operation uses only slices of an operand, only the slices count; if it overwrites part of an operand in
  place, only that part counts. A gather or a strided convolution counts its whole operand.
* The workspace of library convolutions and matrix products is not counted; the library chooses it on the GPU.
* A loop's body counts once per iteration if the compiler knows the number of iterations, otherwise once. Of a
  conditional's branches, the one with the most bytes counts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_BITS |= {f"{kind}{bits}": bits for kind in "suf" for bits in (1, 2, 4, 8, 16, 32, 64)}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_ON_CHIP = re.compile(r"\b[a-z]\w*\[[\d,]*\]\{[^{}]*S\([1-9]\d*\)[^{}]*\}")  # an array in another memory space
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
# Operations that take no time: names and views.
_FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "domain", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}
_STARTS = {"all-gather-start", "collective-permute-start"}  # their results are (input, output, handles)
_LIBRARIES = re.compile(r"__cu(blas|dnn)\$")
_WORKSPACE = re.compile(r", [su]8\[\d+\](\{[^{}]*\})?\)$")  # the last result of a call to a library
_COPIES = re.compile(r"(copy|slice|dynamic-slice)-start")  # between memories, in the background
_CALLED = {"call": "to_apply", "async-start": "calls"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: name of the instruction in the program.
        type: type of its result, as text.
        op: the operation.
        arguments: text inside its parentheses.
        attributes: text after them.
        root: True if its result is that of the computation.
    """

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    root: bool

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _NAME.findall(self.arguments)

    def attribute(self, name: str) -> str:
        """Returns the text of an attribute `name=...` up to the next comma, space or brace, or ""."""
        found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.attributes)
        return found[1] if found else ""

    def quoted(self, name: str) -> str:
        """Returns the text of a quoted attribute `name="..."`, or ""."""
        found = re.search(rf'\b{name}="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A top-level operation of the program.

    Attributes:
        name: name of the instruction in the program.
        kind: the operation, or the target of a custom call.
        calls: True if it is a custom call.
        read: bytes read from main memory.
        written: bytes written to main memory.
        flops: FLOPs of its matrix products and convolutions; a multiply-accumulate counts as two.
        times: number of executions per execution of the program.
        operation: path of JAX's operation in the traced function.
        source: "file:line" as returned by `Program.source`, or "".
    """

    name: str
    kind: str
    calls: bool
    read: int
    written: int
    flops: int
    times: int
    operation: str
    source: str

    @property
    def bytes(self) -> int:
        """Bytes that all its executions read and write in one execution of the program."""
        return self.times * (self.read + self.written)


def array_bytes(dtype: str, dimensions: str) -> int:
    """Returns the size in bytes of an array such as ("bf16", "8,128")."""
    bits = _BITS.get(dtype) or int(re.sub(r"^f(\d+).*|.*", r"\1", dtype) or 0)  # f8e4m3fn and similar
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


def type_bytes(text: str) -> int:
    """Returns the total size in bytes of the arrays of a type, which may be a tuple."""
    return sum(array_bytes(*array) for array in _ARRAY.findall(text))


def main_memory_bytes(text: str) -> int:
    """Returns the size in bytes of those arrays of a type that are in main memory."""
    return type_bytes(_ON_CHIP.sub("", text))


def result_bytes(text: str, op: str) -> int:
    """Returns the size in bytes of the result of operation `op`, which has the type `text`."""
    if op in _STARTS:
        text = _parts(text)[1]
    return sum(array_bytes(*array) for array in _ARRAY.findall(text))


def _parts(text: str) -> list[str]:
    """Returns the elements of a tuple type; an element may be a tuple."""
    parts, depth = [""], 0
    for character in text[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _shape(text: str) -> list[int]:
    """Returns the dimensions of the first array of a type."""
    return [int(n) for n in _ARRAY.search(text)[2].split(",") if n]


class Program:
    """An optimised program, read from `compiled.as_text()`.

    Attributes:
        computations: instructions of each computation, by its name.
        entry: name of the entry computation.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                current = self.computations[opened[2]] = []
                self.entry = opened[2] if opened[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.append(_instruction(match))
        self._tables = {name: dict(_table(text, name)) for name in ("FileNames", "FileLocations", "StackFrames")}

    def kernels(self) -> list[Kernel]:
        """Returns the kernels in program order."""
        return list(self._kernels(self.entry, 1))

    def source(self, instruction: Instruction, inside: str = "hga_flax") -> str:
        """Returns "file:line" of the innermost frame in a folder `inside`, else of the innermost frame, else ""."""
        if plain := instruction.quoted("source_file"):
            return f"{plain}:{instruction.attribute('source_line')}"
        frame, lines = int(instruction.attribute("stack_frame_id") or 0), []
        while frame and frame in self._tables["StackFrames"] and len(lines) < 200:
            entry = self._tables["StackFrames"][frame]
            location = self._tables["FileLocations"].get(entry.get("file_location_id"), {})
            lines.append(f"{self._tables['FileNames'].get(location.get('file_name_id'), '')}:{location.get('line')}")
            frame = entry.get("parent_frame_id", 1) - 1  # stored plus one, since 0 means none
        ours = [line for line in lines if f"/{inside}/" in line]
        return (ours or lines or [""])[0]

    def _kernels(self, computation: str, times: int) -> Iterator[Kernel]:
        by_name = {instruction.name: instruction for instruction in self.computations[computation]}
        for instruction in by_name.values():
            op = instruction.op
            if op in _FREE or op.endswith(("-done", "-update")):
                continue
            if op == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
                yield from self._kernels(instruction.attribute("body"), times * int(trips[1] if trips else 1))
            elif op == "conditional":
                text = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = _NAME.findall(text[1]) if text else [
                    instruction.attribute(f"{which}_computation") for which in ("true", "false")
                ]  # fmt: skip
                branches = [list(self._kernels(name, times)) for name in names]
                yield from max(branches, key=lambda kernels: sum(kernel.bytes for kernel in kernels))
            elif op in _CALLED:
                yield from self._kernels(instruction.attribute(_CALLED[op]), times)
            else:
                yield self._kernel(instruction, by_name, times)

    def _kernel(self, instruction: Instruction, by_name: dict[str, Instruction], times: int) -> Kernel:
        body = self.computations.get(instruction.attribute("calls"), [])
        if _COPIES.fullmatch(instruction.op):
            operands, written = _copied(instruction)
        else:
            kind = instruction.type
            if _LIBRARIES.match(instruction.quoted("custom_call_target")):
                kind = _WORKSPACE.sub(")", kind)
            written = result_bytes(_ON_CHIP.sub("", kind), instruction.op)
            operands = {}
            for number, name in enumerate(instruction.operands):
                whole = main_memory_bytes(by_name[name].type) if name in by_name else 0
                operands.setdefault(name, min(whole, _taken(body, number, whole)))
        for update in _updates(body or [instruction], by_name if not body else {i.name: i for i in body}):
            written = min(written, update)
        return Kernel(
            instruction.name,
            instruction.quoted("custom_call_target") or instruction.op,
            instruction.op == "custom-call",
            sum(operands.values()),
            written,
            sum(self._flops(part, body or list(by_name.values())) for part in body or [instruction]),
            times,
            instruction.quoted("op_name"),
            self.source(instruction),
        )

    def _flops(self, instruction: Instruction, around: list[Instruction]) -> int:
        types = {other.name: other.type for other in around}
        if instruction.op == "dot" or instruction.quoted("custom_call_target").startswith("__cublas$"):
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            if contracted is None:  # library calls have them in their backend config
                contracted = re.search(r'"lhs_contracting_dimensions":\["?([\d",]*)\]', instruction.attributes)
            left = _shape(types[instruction.operands[0]])
            axes = [int(n) for n in contracted[1].replace('"', "").split(",") if n] if contracted else []
            return 2 * math.prod(_shape(instruction.type)) * math.prod(left[axis] for axis in axes)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
        if labels is None:
            return 0
        target, shape = instruction.quoted("custom_call_target"), lambda n: _shape(types[instruction.operands[n]])
        result = _shape(instruction.type)
        # The kernel [taps, inputs per group, outputs], and the map that has one element for each application of it.
        kernel, outputs = shape(1), result
        if target.endswith("BackwardFilter"):
            kernel, outputs = result, shape(1)
        elif target.endswith("BackwardInput"):
            outputs = shape(0)
        return 2 * math.prod(kernel) // kernel[labels[2].index("o")] * math.prod(outputs)


def _copied(instruction: Instruction) -> tuple[dict[str, int], int]:
    """Returns the bytes that the start of an asynchronous copy reads and writes in main memory.

    Its result is (target, source, handle) for a whole copy, ((sources), target, handle) for a slice.
    """
    parts = _parts(instruction.type)
    target, source = parts[:2] if instruction.op == "copy-start" else (parts[1], parts[0])
    moved = type_bytes(target)
    read = moved if main_memory_bytes(source) else 0
    return {instruction.operands[0]: read}, moved if main_memory_bytes(target) else 0


def _instruction(match: re.Match) -> Instruction:
    kind, rest = _split(match[3])
    op, rest = rest.split("(", 1)
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return Instruction(match[2], kind, op, rest[:end], rest[end + 1 :], bool(match[1]))
    return Instruction(match[2], kind, op, rest, "", bool(match[1]))


def _split(text: str) -> tuple[str, str]:
    """Splits "TYPE op(...)", where the type may be a nested tuple."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth and character == " ":
            return text[:end], text[end + 1 :]
    return text, "("


def _taken(body: list[Instruction], number: int, whole: int) -> int:
    """Returns the bytes of an operand that a fused computation reads: only the slices if it uses nothing else."""
    parameter = next((i.name for i in body if i.op == "parameter" and i.arguments.strip() == str(number)), None)
    users = [i for i in body if parameter in i.operands]
    if not users:
        return whole
    taken = 0
    for user in users:
        if user.op in _SLICES and user.operands[0] == parameter:
            taken += type_bytes(user.type)
        elif user.op == "dynamic-update-slice" and user.root and user.operands.index(parameter) == 0:
            continue
        else:
            return whole
    return taken


def _updates(body: list[Instruction], types: dict[str, Instruction]) -> Iterator[int]:
    """Yields the bytes that a computation writes into an operand in place, if that is its result."""
    for instruction in body:
        if instruction.op == "dynamic-update-slice" and (instruction.root or len(body) == 1):
            yield type_bytes(types[instruction.operands[1]].type) if instruction.operands[1] in types else 0


def _table(text: str, name: str) -> Iterator[tuple[int, dict[str, int] | str]]:
    """Yields the rows of one of the source tables that precede a program."""
    block = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    for line in block[1].splitlines() if block else ():
        number, row = line.split(" ", 1)
        fields = (
            {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)} if row[0] == "{" else row.strip('"')
        )
        yield int(number), fields
