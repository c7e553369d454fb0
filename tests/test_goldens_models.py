import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens import relative_error
from tests.goldens_models import MODELS_TOLERANCE, check_model, check_models, rule_tensor

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = ("models", "models_more", "networks", "networks_more")
MODELS = {key: case for name in FILES for key, case in json.loads((GOLDEN / f"{name}.json").read_text()).items()}
FAST = {"tv:resnet50", "timm:skresnext50_32x4d", "tv:resnet18", "timm:resnest14d"}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.goldens", *map(str, arguments)],
        cwd=GOLDEN.parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("key", [pytest.param(key, marks=[] if key in FAST else pytest.mark.slow) for key in MODELS])
def test_networks_equal_torchvisions_and_timms(key):
    worst, agree = check_models({key: MODELS[key]}, relative_error)
    assert worst < MODELS_TOLERANCE
    assert agree


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


def test_an_unknown_network_fails_without_hiding_the_others(tmp_path):
    path = tmp_path / "unknown.json"
    path.write_text(json.dumps({"tv:nonet": {"tensors": {}}, "keras:resnet50": {"tensors": {}}}))
    result = run("models", path)
    assert result.returncode == 1
    first, second, last = result.stdout.splitlines()
    assert "not checked: golden case 'tv:nonet': no PyTorch weights for 'nonet'" in first
    assert "must start with tv: or timm:" in second
    assert last == "max relative error inf"


def test_a_case_without_tensors_is_a_one_line_error(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"tv:resnet50": {}}')
    result = run("models", path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "lacks 'tensors'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
