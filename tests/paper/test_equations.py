"""Eqs. 8-12 against the counted modules, and against numbers worked out by hand."""

import pytest

from hga_flax.paper import equations


def test_the_equations_for_32_channels_by_hand():
    # 84 taps, 21 cells: (1 + 9 + 25 + 49) = 84; 11/2 * 1024 = 5632; 85/2 * 1024 = 43520.
    assert equations.mfe_flops(56, 56, 32) == 2 * 3136 * 32 * 84 == 16_859_136
    assert equations.hap_flops(56, 56, 32) == 301_056
    assert equations.ee_flops(32) == 43_520
    assert equations.hga_flops(56, 56, 32) == 17_203_712
    assert equations.hga_params(32) == 2_688 + 5_632


@pytest.mark.parametrize("channels", [32, 64, 256])
@pytest.mark.parametrize("size", [(56, 56), (28, 12)])
def test_the_counted_modules_equal_the_equations(channels, size):
    compared = {row.equation: row for row in equations.compare_equations(*size, channels)}
    assert list(compared) == ["8", "9", "10", "11", "12"]
    for equation in ("8", "9", "10", "12"):
        assert compared[equation].counted == compared[equation].paper, equation
    # Eq. 9 pools C channels and the module all 4C.
    assert compared["11"].counted - compared["11"].paper == 9 * size[0] * size[1] * channels


def test_where_four_does_not_divide_the_map_the_cells_overlap():
    hap = equations.compare_equations(7, 7, 32)[1]
    assert hap.counted == (7 * 7 + 8 * 8 + 10 * 10) * 32  # of 7 rows: 4 + 4 in two cells, 2 + 3 + 3 + 2 in four
    assert hap.paper == 3 * 49 * 32
