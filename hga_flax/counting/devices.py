"""Peak performance of devices as published by their makers, per JAX device."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """Limits of one device.

    Attributes:
        flops: multiplications and additions per second, dense, bfloat16 with float32 accumulation.
        memory_bytes: size of the main memory in bytes.
        memory_bandwidth: main-memory bandwidth in bytes per second.
        link_bandwidth: bytes per second that it can send to its neighbours, one direction (TPUs: ICI; GPUs of one host:
            NVLink, or PCI Express if there is none).
    """

    flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


MIB = 2**20

# By `device_kind`. TPUs: cloud.google.com/tpu/docs (v5e, v5p, v6e). GPUs: NVIDIA's data sheets of A100 80GB SXM, H100
# SXM, H200 SXM, L4 and T4 (float16), without sparsity. Both sources give link bandwidths for both directions together.
# The memory of GPUs is what nvidia-smi shows, in MiB: the data sheets round it to gigabytes of either kind.
DEVICES = {
    "TPU v5 lite": Device(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Device(459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Device(918e12, 32 * 2**30, 1638e9, 400e9),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 81920 * MIB, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Device(989e12, 81559 * MIB, 3350e9, 450e9),
    "NVIDIA H200": Device(989e12, 143771 * MIB, 4800e9, 450e9),
    "NVIDIA L4": Device(121e12, 23034 * MIB, 300e9, 32e9),
    "Tesla T4": Device(65e12, 15360 * MIB, 300e9, 16e9),
}


def limits(device: jax.Device) -> Device | None:
    """Returns the published limits of a device, or None if it is not listed (CPUs, other GPUs)."""
    return DEVICES.get(device.device_kind)
