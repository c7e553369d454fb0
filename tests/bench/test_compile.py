import importlib.util
import json
import re
import types

import pytest

from hga_flax.__main__ import main
from hga_flax.bench import compile as module
from hga_flax.bench import topologies
from hga_flax.bench.compiled_step import roofline, training_step
from hga_flax.config.loading import configure
from hga_flax.counting.compiled import Cost, cost
from hga_flax.errors import UserError

V5E = types.SimpleNamespace(device_kind="TPU v5 lite")
TINY = [
    "--config=configs/digits.py", "--config.model.name=resnet50", "--config.data.image_size=32",
    "--config.model.options=stage_sizes=(1,), features=16", "--config.model.dtype=bfloat16",
]  # fmt: skip
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


ROW = {
    "topology": "v5e:2x4", "chips": 8, "batch_per_chip": 128, "flops": 3e12,
    "bytes_accessed": 55e9, "main_memory_bytes": 40_000_000_000,
    "peak_memory_bytes": 5 * 2**30, "collectives": {"all-reduce": {"count": 99, "bytes": 57_000_000}},
    "compile_s": 90.0, "model": "resnet50", "attention": "hga", "kernels": 1234, "small_kernels": 56,
    "custom_calls": {"__cudnn$convForward": 53},
}  # fmt: skip
FIELDS = ("flops", "bytes_accessed", "peak_memory_bytes", "collectives", "main_memory_bytes")


def test_what_a_person_reads():
    measured = Cost(**{key: ROW[key] for key in FIELDS})
    row = ROW | roofline(measured, V5E, 128, 8)
    text = module.table(row)
    assert "5.00 of 16 GiB (31%)" in text and "all-reduce 99 x, 57.0 MB" in text
    assert "bound by memory" in text and "2,621 images/s per device" in text
    assert "40 GB to and from main memory; 55 GB accessed, on-chip memory included" in text
    assert "1,234, 56 of them under 1 MB" in text and "__cudnn$convForward 53 x" in text and "does not fit" not in text
    assert "does not fit" in module.table(row | {"peak_memory_bytes": 17 * 2**30})


def test_attentions_side_by_side_and_the_heaviest_kernels():
    measured = Cost(**{key: ROW[key] for key in FIELDS})
    plain = ROW | roofline(measured, V5E, 128, 8) | {"attention": "none", "bytes_accessed": 50e9}
    plain["main_memory_bytes"] = 32e9
    kernel = {"bytes": 5_500_000_000, "kind": "fusion", "operation": "jit(step)/add", "source": "a.py:7", "name": "f"}
    hga = plain | {"attention": "hga", "bytes_accessed": 55e9, "main_memory_bytes": 40e9, "top": [kernel]}
    text = module.comparison([plain, hga])
    assert re.search(r"none +32\.00 +1\.000 +50\.00 +1\.000 ", text)
    assert re.search(r"hga +40\.00 +1\.250 +55\.00 +1\.100 ", text)
    assert re.search(r"5,500\.0 MB +13\.8%  fusion +a\.py:7  jit\(step\)/add", module.top_kernels(hga))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=0"], "--batch=0"),
        (["--compile-limit=0"], "--compile-limit=0: must be positive"),
        (["--compile-limit=inf"], "--compile-limit=inf: must be positive"),
        (["--config.model.attention=hgaa"], "unknown attention 'hgaa'"),
        (["--top=0"], "--top=0: must be positive"),
        (["--compare=none,se", "--sweep"], "--compare and --sweep: choose one"),
        (["--top=3", "--sweep"], "--top and --sweep: choose one"),
        (["--compare=none,sse"], "unknown attention 'sse'"),
        (["--compare="], "--compare= has no value"),
        (["--compare=,se"], "unknown attention ''"),
        (["--topology=b100"], "--topology=b100: no such accelerator; known: h100"),
        (["--config.training.accumulation_steps=2"], "would be counted once; set it to 1, and --batch to"),
    ],
)
@pytest.mark.parametrize("name", ["compile", "tpu"])
def test_bad_input_is_refused_before_anything_is_compiled(name, arguments, message):
    with pytest.raises(UserError, match=message):
        main([name, "--config=configs/digits.py", *arguments])


@pytest.mark.slow
@needs_libtpu
def test_a_step_compiles_for_a_pod_and_scales_weakly(capsys):
    rows = []
    for topology in ("v5e:2x4", "v5e:4x4"):
        main(["compile", *TINY, f"--topology={topology}", "--batch=8", "--json"])
        rows.append(json.loads(capsys.readouterr().out))
    few, many = rows
    assert (few["chips"], many["chips"], many["batch_per_chip"]) == (8, 16, 8)
    assert set(few["collectives"]) == {"all-reduce"} and many["collectives"] == few["collectives"]
    assert many["bytes_accessed"] == pytest.approx(few["bytes_accessed"], rel=0.01)
    assert 0 < few["main_memory_bytes"] < few["bytes_accessed"]
    assert 0 < few["peak_memory_bytes"] < few["memory_capacity_bytes"] == 16 * 2**30
    assert few["images_per_s"] == pytest.approx(8 / few["roofline_s"])


@pytest.mark.slow
@pytest.mark.skipif(not topologies.has_compiler("cuda"), reason="jax-cuda12-pjrt is not installed")
@pytest.mark.parametrize(
    "model",
    [
        "--config.model.name=resnet50", "--config.model.name=resnext50_32x4d", "--config.model.name=resnet18",
        "--config.model.name=vgg11_bn", "--config.model.name=densenet121", "--config.model.name=googlenet",
    ],
)  # fmt: skip
def test_a_step_for_a_gpu_holds_no_sort_and_no_scatter(model):
    """Compiled, with training.deterministic, as every network that pools is by default."""
    small = {"resnet50": "stage_sizes=(1,)", "resnext50_32x4d": "stage_sizes=(1,)", "resnet18": "stage_sizes=(1,)"}
    small |= {"densenet121": "block_sizes=(1,)", "googlenet": "width_divisor=8", "vgg11_bn": "features=8"}
    options = f"--config.model.options={small[model.rpartition('=')[2]]}"
    config = configure(
        "configs/digits.py", [*TINY[2:4], model, options, TINY[-1], "--config.model.attention=hga"], None
    )
    config = config.copy_and_resolve_references()
    config.training.compilation_cache, config.training.batch_size, config.data.image_size = "", 16, 64
    assert config.training.deterministic
    mesh, platform = topologies.topology_mesh("h100")
    step, state, batch = training_step(config, mesh)
    compiled = step.trace(state, batch).lower(lowering_platforms=(platform,)).compile()
    assert not re.search(r" (sort|scatter|select-and-scatter)\(", compiled.as_text())
    assert cost(compiled).kernels > 50


@pytest.mark.slow
@pytest.mark.skipif(not topologies.has_compiler("cuda"), reason="jax-cuda12-pjrt is not installed")
def test_attentions_are_compared_for_gpus_and_eight_of_them_gather_nothing(capsys):
    main(["compile", *TINY, "--topology=h100:8", "--batch=8", "--compare=none,hga", "--top=2", "--json"])
    plain, hga = json.loads(capsys.readouterr().out)
    assert (plain["attention"], hga["attention"], hga["chips"]) == ("none", "hga", 8)
    assert set(plain["collectives"]) == set(hga["collectives"]) == {"all-reduce"}
    assert len(hga["top"]) == 2 and "/hga_flax/" in hga["top"][0]["source"]
    assert hga["kernels"] > plain["kernels"] >= plain["small_kernels"] > 0
    assert hga["images_per_s"] == pytest.approx(8 / hga["roofline_s"])
