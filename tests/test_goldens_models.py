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


<<<<<<<< HEAD:tests/test_goldens.py
@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_without_cases_is_refused(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError):
        goldens.load(str(tmp_path / "f.json"))


def test_the_copied_file_is_whole():
    with open("tests/golden/hga.json") as file:
        assert len(json.load(file)) == 5
========
def test_rule():
    assert rule_tensor("bn1.running_var", [1000]).min() >= 1
    assert abs(rule_tensor("bn1.weight", [1000]).mean() - 1) < 0.02
    assert abs(rule_tensor("fc.weight", [1000, 50]).std() - 0.2) < 0.01


def test_a_wrong_network_fails_whatever_the_precision(monkeypatch, capsys):
    monkeypatch.setattr("tests.goldens_models.our_logits", lambda key, case, dtype: np.ones((2, 50)))
    case = {"logits": np.zeros((2, 40)) + 2, "norm": [1, 1], "argmax": [3, 3]}
    assert check_model("tv:x", case, relative_error, jnp.float32)[0] > 0.4
    worst, agree = check_models({"tv:x": case}, relative_error)
    assert worst > 0.4
    assert not agree
    assert "DIFFERS  (in float32 and in float64)" in capsys.readouterr().out


def test_bad_files_are_one_line_errors(tmp_path):
    path = tmp_path / "bad.json"
    for content, message in (
        ("{}", "holds no cases"),
        ('{"tv:nonet": {"tensors": {}}}', "no PyTorch weights for 'nonet'"),
    ):
        path.write_text(content)
        result = run("models", path)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
>>>>>>>> d5e4498 (Named functions instead of assigned lambdas; the goldens' test bears its module's name):tests/test_goldens_models.py
