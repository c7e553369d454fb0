"""What the README says is so."""

import json
import re
import tomllib

import pytest

from hga_flax.attention import attention_names
from hga_flax.models import CIFAR_PATTERN, model_names
from tests.commands import ROOT, run

README = (ROOT / "README.md").read_text()


def test_the_example_runs():
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(2, 56, 56, 64)\n"


def test_the_names_are_the_registered_ones():
    (row,) = re.findall(r"^\| attentions \| (.*) \|$", README, flags=re.MULTILINE)
    assert set(attention_names()) == set(re.findall(r"`([^`]+)`", row))
    networks = re.findall(r"`([^`]+)`", (ROOT / "docs" / "networks.md").read_text())
    assert {name.removesuffix("_bn") for name in (*model_names(), CIFAR_PATTERN)} <= set(networks)


def test_its_first_commands_stand_in_the_first_lines():
    lines = README.splitlines()
    assert any(line.startswith("    make demo") for line in lines[:25]) and len(lines) <= 140


def test_files_and_targets_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for config in re.findall(r"`(\w+\.py)`", README.split("Configurations:")[1].split("with the paper")[0]):
        assert (ROOT / "configs" / config).exists()


def test_the_requirements_are_what_the_library_and_its_extras_need():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    runtime, tools = wanted[: wanted.index("tensorboard>=2.20,<3")], wanted[wanted.index("tensorboard>=2.20,<3") :]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = [*project["dependencies"], *extras["train"], *extras["pictures"]]
    assert sorted(installed) == sorted([*filter(None, runtime), "hga-flax[train]"])
    onnx = extras["onnx"]
    assert set(onnx) <= set(tools)
    kept = ["tensorboard", "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"]
    kept += ["setuptools", "zensical", "mkdocstrings-python"]
    assert [line.split(">")[0] for line in tools if line not in onnx] == kept
    assert all(re.search(r">=.*,<", line) for line in wanted if line)  # ranges, neither pins nor bare names


@pytest.mark.medium
def test_the_json_keys_that_it_promises(tmp_path):
    from tests.test_train import SHORT, TINY

    assert run(*TINY, *SHORT, f"--workdir={tmp_path}").returncode == 0
    row = json.loads(run("evaluate.py", f"--workdir={tmp_path}", "--json").stdout.splitlines()[-1])
    sentence = README.split("one JSON object:")[1].split("\n\n")[0]
    assert set(row) == set(re.findall(r"`(\w+)`", sentence))
