import json

import pytest

from hga_flax.errors import UserError
from tests import goldens


def test_a_wrong_golden_value_is_noticed(tmp_path, capsys):
    cases = {"7x7x32x32": goldens.load("tests/golden/hga.json")["7x7x32x32"]}
    assert goldens.check_hga(cases) < 1e-5
    cases["7x7x32x32"]["e"][0][0] *= -1
    assert goldens.check_hga(cases) > 1e-3
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_not_a_number_is_an_infinite_error():
    assert goldens.relative_error([float("nan")], [1.0]) == float("inf")


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_without_cases_is_refused(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError):
        goldens.load(str(tmp_path / "f.json"))


def test_the_copied_file_is_whole():
    with open("tests/golden/hga.json") as file:
        assert len(json.load(file)) == 5
