import importlib.util
import json
import math
import os
import re
import time
import types

import jax
import pytest

from hga_flax.__main__ import main
from hga_flax.analysis import tpu
from hga_flax.analysis.compiled import Cost, cost
from hga_flax.analysis.devices import limits
from hga_flax.errors import ConfigError, UserError, expand
from tests.training import tiny

V5E = types.SimpleNamespace(device_kind="TPU v5 lite")
TINY = [
    "--config=configs/digits.py", "--config.model.name=resnet50", "--config.data.image_size=32",
    "--config.model.options=stage_sizes=(1,), features=16", "--config.model.dtype=bfloat16",
]  # fmt: skip
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_the_step_that_is_compiled_is_the_trainings_over_all_devices():
    c, mesh = tiny.config(), tiny.mesh(2)
    step, state, batch = tpu.training_step(c, mesh)
    result = cost(step.trace(state, batch).lower().compile())
    assert set(result.collectives) == {"all-reduce"}
    assert result.flops > 0 and result.bytes_accessed > 0 and result.peak_memory_bytes > 0
    _, real, real_step = tiny.build(c, mesh)
    described = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert described(state) == described(real)
    assert step.lower(state, batch).as_text() == real_step.lower(state, batch).as_text()


def test_the_roofline_is_the_slowest_of_three():
    def bound(flops, moved, exchanged):
        measured = Cost(flops, moved, 0, {"all-reduce": {"count": 1, "bytes": exchanged}})
        return tpu.roofline(measured, V5E, 64, 8)

    assert bound(197e12, 0, 0)["roofline_s"] == pytest.approx(1) and bound(197e12, 0, 0)["bound"] == "compute"
    assert bound(197e12, 1638e9, 0)["images_per_s"] == pytest.approx(32)
    links = bound(1, 1, 200e9)
    assert links["bound"] == "links" and links["roofline_s"] == pytest.approx(2 * 7 / 8)


@pytest.mark.parametrize("start", [1, 64, 5000])
@pytest.mark.parametrize("largest", [0, 1, 5, 40, 127, 128])
def test_the_sweep_finds_the_largest_batch_in_few_compilations(start, largest):
    capacity, tried = 16_000, []

    def fits(batch):
        assert batch % 32 == 0 and batch not in tried
        tried.append(batch)
        memory = 1000 + batch / 32 * 15_000 / (largest + 0.7) * (1 + 0.02 * (len(tried) % 2))  # not quite even
        return int(memory) if batch <= 32 * largest else None

    assert tpu.largest_fitting(fits, capacity, start, 32, 4096) == 32 * largest
    assert len(tried) <= 9


ROW = {
    "topology": "v5e:2x4", "chips": 8, "batch_per_chip": 128, "flops": 3e12, "bytes_accessed": 55e9,
    "peak_memory_bytes": 5 * 2**30, "collectives": {"all-reduce": {"count": 99, "bytes": 57_000_000}},
    "compile_s": 90.0,
}  # fmt: skip


def test_what_a_person_reads():
    measured = Cost(*(ROW[key] for key in ("flops", "bytes_accessed", "peak_memory_bytes", "collectives")))
    row = ROW | tpu.roofline(measured, V5E, 128, 8)
    text = tpu.table(row)
    assert "5.00 of 16 GiB (31%)" in text and "all-reduce 99 x, 57.0 MB" in text
    assert "bound by memory" in text and "1,906 images/s a chip" in text
    rows = [
        row | {"fits": True, "largest": True},
        {"batch_per_chip": 256, "fits": False, "given_up": True},
        {"batch_per_chip": 512, "fits": False, "given_up": False},
    ]
    assert re.search(
        r"128 .* the largest that fits\n\s+256 not compiled in time\n\s+512 does not fit", tpu.sweep_table(rows)
    )


def test_what_takes_too_long_is_given_up():
    assert tpu.within(60, math.hypot, 3, 4) == (True, 5)
    assert tpu.within(0.5, time.sleep, 60) == (False, None)
    with pytest.raises(UserError, match="ended with code 3"):
        tpu.within(60, os._exit, 3)
    with pytest.raises(UserError, match=r"home folder|file system"):
        tpu.within(60, expand, "~nobody-of-this-name/x", "--workdir")


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        main(["tpu", "--config=configs/digits.py"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=0"], "--batch=0"),
        (["--compile-limit=0"], "--compile-limit=0: must be positive"),
        (["--compile-limit=inf"], "--compile-limit=inf: must be positive"),
        (["--config.model.attention=hgaa"], "unknown attention 'hgaa'"),
        (["--config.training.accumulation_steps=2"], "would be counted once; set it to 1, and --batch to"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["tpu", "--config=configs/digits.py", *arguments])


@pytest.mark.slow
@needs_libtpu
def test_a_step_compiles_for_a_pod_and_scales_weakly(capsys):
    rows = []
    for topology in ("v5e:2x4", "v5e:4x4"):
        main(["tpu", *TINY, f"--topology={topology}", "--batch=8", "--json"])
        rows.append(json.loads(capsys.readouterr().out))
    few, many = rows
    assert (few["chips"], many["chips"], many["batch_per_chip"]) == (8, 16, 8)
    assert set(few["collectives"]) == {"all-reduce"} and many["collectives"] == few["collectives"]
    assert many["bytes_accessed"] == pytest.approx(few["bytes_accessed"], rel=0.01)
    assert 0 < few["peak_memory_bytes"] < few["memory_capacity_bytes"] == 16 * 2**30
    assert few["images_per_s"] == pytest.approx(8 / few["roofline_s"])


def test_the_chips_of_the_topology_are_checked_and_not_those_that_are_here():
    c = tiny.config(training__batch_size=6, data__mixup=0.2)  # 8 devices are here
    with pytest.raises(ConfigError, match="each of the 2 devices needs an even number of images"):
        tpu.training_step(c, tiny.mesh(2))
    c = tiny.config(training__batch_size=4, data__mixup=0.2)
    step, state, batch = tpu.training_step(c, tiny.mesh(2))
    assert step.trace(state, batch)


def test_what_libtpu_logs_before_it_refuses_is_not_shown(monkeypatch, capfd):
    def refuse(name, platform):
        for _ in range(6):
            os.write(2, b"I0000 tpu_topology.cc:123] chatter\n")
        raise RuntimeError("INVALID_ARGUMENT: no such topology")

    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(UserError, match="--topology=v5e:9x9: INVALID_ARGUMENT"):
        tpu.topology_mesh("v5e:9x9")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x7", "v9", "v4:2x2x1"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(UserError, match=f"--topology={topology}"):
        tpu.topology_mesh(topology)


@pytest.mark.slow
@needs_libtpu
def test_chips_have_published_limits():
    for topology in ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"):
        assert limits(tpu.topology_mesh(topology).devices.flat[0]) is not None
