import math
import os
import re
import time
import types

import pytest

from hga_flax.bench import sweep as module
from hga_flax.errors import UserError, expand


@pytest.mark.parametrize("start", [1, 64, 5000])
@pytest.mark.parametrize("largest", [0, 1, 5, 40, 127, 128])
def test_the_sweep_finds_the_largest_batch_in_few_compilations(start, largest):
    capacity, tried = 16_000, []

    def fits(batch):
        assert batch % 32 == 0 and batch not in tried
        tried.append(batch)
        memory = 1000 + batch / 32 * 15_000 / (largest + 0.7) * (1 + 0.02 * (len(tried) % 2))  # not quite even
        return int(memory) if batch <= 32 * largest else None

    assert module.largest_fitting(fits, capacity, start, 32, 4096) == 32 * largest
    assert len(tried) <= 9


def test_what_a_person_reads():
    row = {"batch_per_chip": 128, "peak_memory_bytes": 5 * 2**30, "main_memory_bytes": 55e9, "images_per_s": 1906.0}
    rows = [
        row | {"fits": True, "largest": True},
        {"batch_per_chip": 256, "fits": False, "given_up": True},
        {"batch_per_chip": 512, "fits": False, "given_up": False},
    ]
    assert re.search(
        r"128 .* the largest that fits\n\s+256 not compiled in time\n\s+512 does not fit", module.sweep_table(rows)
    )


def test_what_takes_too_long_is_given_up():
    assert module.within(60, math.hypot, 3, 4) == (True, 5)
    assert module.within(0.5, time.sleep, 60) == (False, None)
    with pytest.raises(UserError, match="ended with code 3"):
        module.within(60, os._exit, 3)
    with pytest.raises(UserError, match=r"home folder|file system"):
        module.within(60, expand, "~nobody-of-this-name/x", "--workdir")


@pytest.mark.parametrize(("peak", "largest"), [(40, 64), (90, 32), (120, 0)])
def test_a_step_larger_than_the_memory_does_not_fit_also_where_it_compiles(peak, largest, monkeypatch):
    """The compiler for GPUs says nothing; here each image takes the 64th part of `peak` of 100 bytes."""

    def compiled(seconds, function, modules, config, topology, batch):
        return True, {"batch_per_chip": batch, "peak_memory_bytes": peak * batch // 32, "memory_capacity_bytes": 100}

    monkeypatch.setattr(module, "within", compiled)
    monkeypatch.setattr(module, "to_json", lambda config: "")
    monkeypatch.setattr("hga_flax.counting.devices.limits", lambda device: types.SimpleNamespace(memory_bytes=100))
    rows = module.sweep(None, "h100", None, 32, 60, lambda line: None)
    assert [row["batch_per_chip"] for row in rows if row["largest"]] == ([largest] if largest else [])
    assert all(row["fits"] == (row["peak_memory_bytes"] <= 100) for row in rows)
