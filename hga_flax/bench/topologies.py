"""Descriptions of absent accelerators to compile for: TPU slices, and the NVIDIA GPUs of one host.

For TPUs, the compiler and the topologies come from libtpu. For GPUs, the compiler is in the package jax-cuda12-pjrt.
Given a description of the GPU, it needs neither GPU nor driver, but then it does not autotune.
"""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from hga_flax.errors import UserError, one_line

TPUS = {"v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}  # accelerator type for libtpu, by generation
MOST_GPUS = 8  # on one host; the links between hosts are different


class Gpu(NamedTuple):
    """A GPU's properties for the compiler, from NVIDIA's data sheets and the tables of the CUDA C++ Programming Guide.

    Attributes:
        kind: JAX's `device_kind`, the key for its memory in `devices.py`.
        capability: compute capability.
        cores: number of streaming multiprocessors (SMs).
        clock_ghz: boost clock in GHz.
        fpus: float32 units per SM.
        threads: resident threads per SM.
        shared: bytes of shared memory per SM.
        cache: bytes of L2 cache.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    fpus: int
    threads: int
    shared: int
    cache: int


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 128, 2048, 233472, 50 * 2**20),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 128, 2048, 233472, 50 * 2**20),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 64, 2048, 167936, 40 * 2**20),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 2.04, 128, 1536, 102400, 48 * 2**20),
}
EXAMPLES = "h100, h100:8 (on one host), h200, a100, l4, v5e:2x4, v5e:16x16, v5p:2x2x1, v6e:2x4"


def topology_mesh(name: str) -> tuple[Any, str]:
    """Returns a mesh of a topology's (absent) devices, and the platform to lower for.

    Args:
        name: a GPU of `GPUS`, with ":N" for N of them on one host, or GENERATION:SHAPE for a TPU.

    Raises:
        UserError: the compiler is not installed, or the topology is unknown.
    """
    kind = name.partition(":")[0]
    if kind not in GPUS and not re.fullmatch(r"v\d+\w*", kind):
        raise UserError(f"--topology={name}: no such accelerator; known: {EXAMPLES}")
    devices = _gpus(name) if kind in GPUS else _tpus(name)
    import numpy as np
    from jax.sharding import Mesh

    from hga_flax.counting.devices import limits
    from hga_flax.processes.mesh import DATA_AXIS

    if limits(devices[0]) is None:
        raise UserError(f"--topology={name}: '{devices[0].device_kind}' is not a known device; known: {EXAMPLES}")
    return Mesh(np.asarray(devices), (DATA_AXIS,)), "cuda" if kind in GPUS else "tpu"


def has_compiler(platform: str) -> bool:
    """Returns whether the compiler package for "cuda" or "tpu" is installed."""
    if platform == "tpu":
        return importlib.util.find_spec("libtpu") is not None
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") is not None for version in (12, 13))


def _gpus(name: str) -> list[Any]:
    kind, _, count = name.partition(":")
    if not has_compiler("cuda"):
        raise UserError('the compiler for GPUs is not installed; pip install ".[compile-gpu]"')
    if count and not (count.isdecimal() and 1 <= int(count) <= MOST_GPUS):
        raise UserError(f"--topology={name}: after the colon, give the number of GPUs on one host, 1 to {MOST_GPUS}")
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    with _without_chatter():
        return topologies.get_topology_desc(
            platform="cuda", target_config=_target(GPUS[kind]), topology=f"1x1x{count or 1}"
        ).devices


def _target(gpu: Gpu) -> str:
    """Returns XLA's description of a GPU, a GpuTargetConfigProto in text format."""
    from hga_flax.counting.devices import DEVICES

    device = DEVICES[gpu.kind]
    major, minor = gpu.capability
    return f"""
        gpu_device_info {{
            threads_per_block_limit: 1024
            threads_per_warp: 32
            shared_memory_per_block: 49152
            shared_memory_per_core: {gpu.shared}
            shared_memory_per_block_optin: {gpu.shared - 1024}
            threads_per_core_limit: {gpu.threads}
            core_count: {gpu.cores}
            fpus_per_core: {gpu.fpus}
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
            memory_bandwidth: {int(device.memory_bandwidth)}
            l2_cache_size: {gpu.cache}
            clock_rate_ghz: {gpu.clock_ghz}
            device_memory_size: {int(device.memory_bytes)}
            cuda_compute_capability {{ major: {major} minor: {minor} }}
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        runtime_version {{ major: 12 minor: 9 patch: 0 }}
        device_description_str: "{gpu.kind}"
    """


def _tpus(name: str) -> list[Any]:
    if not has_compiler("tpu"):
        raise UserError('the compiler for TPUs is not installed; pip install ".[tpu]", or libtpu alone')
    # Without these libtpu queries the cloud metadata server and locks out other processes that only compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", TPUS.get(name.partition(":")[0], ""))
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        with _without_chatter():
            return topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # libtpu raises nothing more specific
        raise UserError(
            f"--topology={name}: {one_line(error)[:200]}; write GENERATION:SHAPE, such as v5e:4x4, v5p:2x2x1, v6e:2x4"
        ) from None


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Suppresses standard error, where the C++ compilers log the text that their exceptions repeat."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
