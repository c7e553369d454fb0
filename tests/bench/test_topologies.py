import os

import pytest

from hga_flax.__main__ import main
from hga_flax.bench import topologies
from hga_flax.counting.devices import DEVICES, limits
from hga_flax.errors import UserError

needs_libtpu = pytest.mark.skipif(not topologies.has_compiler("tpu"), reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(not topologies.has_compiler("cuda"), reason="jax-cuda12-pjrt is not installed")


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x4", "tpu"), ("h100", "compile-gpu")])
def test_without_the_compiler_one_line_says_what_to_install(topology, extra, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install .*{extra}"):
        main(["compile", "--config=configs/digits.py", f"--topology={topology}"])


@pytest.mark.parametrize("name", topologies.GPUS)
def test_every_gpu_has_published_limits(name):
    gpu = topologies.GPUS[name]
    assert str(int(DEVICES[gpu.kind].memory_bytes)) in topologies._target(gpu)


@pytest.mark.parametrize("topology", ["h100:0", "h100:9", "h100:2x4", "h100:x", "a100:-1"])
def test_how_many_gpus_there_may_be(topology, monkeypatch):
    monkeypatch.setattr(topologies, "has_compiler", lambda platform: True)
    with pytest.raises(UserError, match="1 to 8"):
        topologies.topology_mesh(topology)


def test_what_libtpu_logs_before_it_refuses_is_not_shown(monkeypatch, capfd):
    def refuse(name, platform):
        for _ in range(6):
            os.write(2, b"I0000 tpu_topology.cc:123] chatter\n")
        raise RuntimeError("INVALID_ARGUMENT: no such topology")

    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(UserError, match="--topology=v5e:9x9: INVALID_ARGUMENT"):
        topologies.topology_mesh("v5e:9x9")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:3x7", "v9", "v4:2x2x1"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(UserError, match=f"--topology={topology}"):
        topologies.topology_mesh(topology)


@pytest.mark.slow
@needs_libtpu
def test_chips_have_published_limits():
    for topology in ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"):
        assert limits(topologies.topology_mesh(topology)[0].devices.flat[0]) is not None


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("name", topologies.GPUS)
def test_a_gpu_that_is_not_here_has_its_devices(name):
    mesh, platform = topologies.topology_mesh(f"{name}:8")
    assert (mesh.devices.size, platform) == (8, "cuda")
    assert limits(mesh.devices.flat[0]) is DEVICES[topologies.GPUS[name].kind]
