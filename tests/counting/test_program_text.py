import jax
import jax.numpy as jnp
import pytest

from hga_flax.bench.topologies import has_compiler, topology_mesh
from hga_flax.counting.compiled import cost, heaviest
from hga_flax.counting.program_text import Program, array_bytes, type_bytes

# Written by hand; the bytes stand beside each line.
TEXT = """\
HloModule jit_f, is_scheduled=true

FileNames
1 "/lib/jax/core.py"
2 "/home/me/hga_flax/models/norm.py"
FunctionNames
1 "f"
FileLocations
1 {file_name_id=2 function_name_id=1 line=61 end_line=61 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused_slice (p.0: f32[100,8], p.1: f32[4,8]) -> f32[4,8] {
  %p.0 = f32[100,8]{1,0} parameter(0)
  %p.1 = f32[4,8]{1,0} parameter(1)
  %slice.1 = f32[4,8]{1,0} slice(%p.0), slice={[0:4], [0:8]}
  ROOT %add.1 = f32[4,8]{1,0} add(%slice.1, %p.1)
}

%fused_update (p.2: f32[100,8], p.3: f32[4,8], p.4: s32[]) -> f32[100,8] {
  %p.2 = f32[100,8]{1,0} parameter(0)
  %p.3 = f32[4,8]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %update.1 = f32[100,8]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %p.4)
}

%fused_dot (p.5: bf16[16,64], p.6: bf16[64,32]) -> f32[16,32] {
  %p.5 = bf16[16,64]{1,0} parameter(0)
  %p.6 = bf16[64,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[16,32]{1,0} dot(%p.5, %p.6), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t = (s32[], f32[10]{0}) parameter(0)
  %gte.0 = s32[] get-tuple-element(%t), index=0
  %gte.1 = f32[10]{0} get-tuple-element(%t), index=1
  %copy.2 = f32[10]{0} copy(%gte.1)
  ROOT %tuple.2 = (s32[], f32[10]{0}) tuple(%gte.0, %copy.2)
}

%condition (t.1: (s32[], f32[10])) -> pred[] {
  %t.1 = (s32[], f32[10]{0}) parameter(0)
  ROOT %c.1 = pred[] constant(false)
}

ENTRY %main (a: f32[100,8], b: f32[4,8], c: bf16[16,64], d: bf16[64,32], x: bf16[2,8,8,4], w: bf16[6,3,3,4]) -> f32[16,32] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %c = bf16[16,64]{1,0} parameter(2)
  %d = bf16[64,32]{1,0} parameter(3)
  %x = bf16[2,8,8,4]{3,2,1,0} parameter(4)
  %w = bf16[6,3,3,4]{3,2,1,0} parameter(5)
  %zero = s32[] constant(0)
  %sliced = f32[4,8]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(f)/add" stack_frame_id=2}
  %twice = f32[4,8]{1,0} add(%sliced, %sliced)
  %updated = f32[100,8]{1,0} fusion(%a, %twice, %zero), kind=kLoop, calls=%fused_update
  %product = f32[16,32]{1,0} fusion(%c, %d), kind=kCustom, calls=%fused_dot
  %conv = (bf16[2,8,8,6]{3,2,1,0}, u8[128]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %map = bf16[2,8,8,6]{3,2,1,0} get-tuple-element(%conv), index=0
  %back = (bf16[2,8,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%map, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %filter = (bf16[6,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %map), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %ten = f32[10]{0} bitcast(%b)
  %tuple.1 = (s32[], f32[10]{0}) tuple(%zero, %ten)
  %loop = (s32[], f32[10]{0}) while(%tuple.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[16,32]{1,0} bitcast(%product)
}
"""  # noqa: E501
MAP, OUT, WEIGHTS = 2 * 8 * 8 * 4 * 2, 2 * 8 * 8 * 6 * 2, 6 * 3 * 3 * 4 * 2
EXPECTED = {  # without workspaces: (read, written) bytes, FLOPs, times
    "sliced": ((128 + 128, 128), 0, 1),  # the slice of the 3,200 bytes alone
    "twice": ((128, 128), 0, 1),  # one operand, read once
    "updated": ((128 + 4, 128), 0, 1),  # in place
    "product": ((16 * 64 * 2 + 64 * 32 * 2, 16 * 32 * 4), 2 * 16 * 64 * 32, 1),
    "conv": ((MAP + WEIGHTS, OUT), 2 * 9 * 4 * (2 * 8 * 8 * 6), 1),
    "back": ((OUT + WEIGHTS, MAP), 2 * 9 * 4 * (2 * 8 * 8 * 6), 1),
    "filter": ((MAP + OUT, WEIGHTS), 2 * 9 * 4 * (2 * 8 * 8 * 6), 1),
    "copy.2": ((40, 40), 0, 5),
}


def test_kernels_of_a_text_whose_bytes_are_known_by_hand():
    kernels = Program(TEXT).kernels()
    found = {k.name: ((k.read, k.written), k.flops, k.times) for k in kernels}
    assert found == EXPECTED
    assert kernels[-1].bytes == 5 * 80
    assert [k.kind for k in kernels if k.calls] == [
        "__cudnn$convForward", "__cudnn$convBackwardInput", "__cudnn$convBackwardFilter"
    ]  # fmt: skip


def test_a_kernel_knows_the_innermost_line_of_ours():
    sliced, twice = Program(TEXT).kernels()[:2]
    assert sliced.source == "/home/me/hga_flax/models/norm.py:61" and sliced.operation == "jit(f)/add"
    assert twice.source == ""
    older = TEXT.replace("stack_frame_id=2", 'source_file="/a/b.py" source_line=9')
    assert Program(older).kernels()[0].source == "/a/b.py:9"


def test_bytes_of_types():
    assert array_bytes("bf16", "8,128") == 2048 and array_bytes("pred", "") == 1 and array_bytes("s4", "6") == 3
    assert array_bytes("c64", "8") == 64 and array_bytes("c128", "8") == 128 and array_bytes("u1", "16") == 2
    assert array_bytes("f8e4m3fn", "8") == 8 and array_bytes("token", "") == 0
    assert type_bytes("(f32[2,3]{1,0}, (s8[5]{0}, u32[]))") == 24 + 5 + 4


# A map of 64 KiB that a TPU's compiler prefetches in two halves; S(1) is on-chip memory, S(2) holds handles.
PREFETCH = """\
HloModule jit_f, is_scheduled=true

%fused (p.0: bf16[128,256], p.1: bf16[256]) -> bf16[128,256] {
  %p.0 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = bf16[256]{0:T(256)(128)(2,1)S(1)} parameter(1)
  ROOT %add.1 = bf16[128,256]{1,0:T(8,128)(2,1)} multiply(%p.0, %p.0)
}

ENTRY %main (x: bf16[128,256], b: bf16[256]) -> bf16[128,256] {
  %x = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256]{0:T(256)(128)(2,1)} parameter(1)
  %slice-start = ((bf16[128,256]{1,0:T(8,128)(2,1)}), bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:64], [0:256]}
  %slice-start.1 = ((bf16[128,256]{1,0:T(8,128)(2,1)}), bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[64:128], [0:256]}
  %copy-start = (bf16[256]{0:T(256)(128)(2,1)S(1)}, bf16[256]{0:T(256)(128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %copy-done = bf16[256]{0:T(256)(128)(2,1)S(1)} copy-done(%copy-start)
  %slice-done = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %slice-done.1 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.1)
  %whole = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} custom-call(%slice-done, %slice-done.1), custom_call_target="ConcatBitcast"
  %fusion = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} fusion(%whole, %copy-done), kind=kLoop, calls=%fused
  %copy-start.1 = (bf16[128,256]{1,0:T(8,128)(2,1)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%fusion)
  ROOT %copy-done.1 = bf16[128,256]{1,0:T(8,128)(2,1)} copy-done(%copy-start.1)
}
"""  # noqa: E501


def test_what_the_compiler_keeps_on_chip_moves_nothing_to_or_from_main_memory():
    half = 64 * 256 * 2
    moved = {kernel.name: (kernel.read, kernel.written) for kernel in Program(PREFETCH).kernels()}
    assert moved == {
        "slice-start": (half, 0), "slice-start.1": (half, 0), "copy-start": (512, 0), "whole": (0, 0),
        "fusion": (0, 0), "copy-start.1": (0, 2 * half),
    }  # fmt: skip


def test_a_program_of_this_machine_can_be_read():
    x = jnp.ones((64, 32))
    compiled = jax.jit(lambda x: jnp.sin(x) @ x.T).lower(x).compile()
    assert cost(compiled).kernels >= 1
    x = x.astype(jnp.complex64)  # as an attention with a Fourier transform holds them
    doubled = jax.jit(lambda x: x * 2 + 1).lower(x).compile()
    assert cost(doubled).main_memory_bytes >= 2 * 64 * 32 * 8
    (first,) = heaviest(compiled, 1)
    assert set(first) == {"bytes", "kind", "operation", "source", "name"} and first["bytes"] >= 64 * 32 * 4


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler("cuda"), reason="jax-cuda12-pjrt is not installed")
@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda x, y: jnp.sin(x) + y, [(1024, 256)] * 2, 3 * 1024 * 256 * 4),
        (lambda x: x[:16] * 2, [(1024, 256)], 2 * 16 * 256 * 4),
        (lambda x: x.T + 0.5, [(1024, 256)], 2 * 1024 * 256 * 4),
        (lambda x, y: x @ y, [(2048, 64), (64, 1024)], (2048 * 64 + 64 * 1024 + 2048 * 1024) * 4),
    ],
    ids=["sum", "slice", "transposed", "product"],
)
def test_programs_for_a_gpu_whose_bytes_are_known_by_hand(function, shapes, expected):
    mesh, platform = topology_mesh("h100")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    compiled = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).compile()
    measured = cost(compiled)
    assert measured.bytes_accessed == pytest.approx(expected, rel=0.02)
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        assert measured.flops == 2 * 2048 * 64 * 1024
