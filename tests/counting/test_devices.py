import jax
import pytest

from hga_flax.counting.devices import DEVICES, limits


def test_a_cpu_has_no_published_limits():
    assert limits(jax.devices()[0]) is None


@pytest.mark.parametrize("kind", DEVICES)
def test_units_are_right(kind):
    """A figure in tera or giga units would be out of these ranges by a factor of 1000."""
    device = DEVICES[kind]
    assert 10e12 < device.flops < 5e15
    assert 10e9 < device.memory_bytes < 1e12
    # The size in its name or its data sheet, in gibibytes, less what the firmware and the error correction take.
    named = {"A100": 80, "H100": 80, "H200": 141, "L4": 24, "T4": 16}
    if size := next((size for name, size in named.items() if name in kind), None):
        assert 0.93 * size * 2**30 <= device.memory_bytes <= size * 2**30
    assert 200e9 < device.memory_bandwidth < 20e12
    assert 10e9 < device.link_bandwidth < 2e12
