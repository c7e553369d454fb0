"""The wheel holds the package and nothing else, and is all that the README's example needs."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.commands import ROOT
from tests.test_readme import README

FILES = {"py.typed", "imagenet_classes.txt"}  # what is no program
BUILD = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a folder of its own, so that the checkout gets no build/ and no other test is met."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in ("hga_flax", "configs", "docs", "examples"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-c", BUILD, str(out)]
    result = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    package = [path for path in (ROOT / "hga_flax").rglob("*") if path.suffix == ".py" or path.name in FILES]
    assert sorted(names) == sorted(str(path.relative_to(ROOT)) for path in package)
    assert {pathlib.Path(name).name for name in names} >= FILES


def test_the_wheel_asks_for_what_the_project_declares(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    wanted = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", archive.read(metadata).decode(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wanted == [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]


def test_the_package_never_imports_what_the_wheel_lacks():
    from tests.test_house import FILES, names

    for path in FILES:
        assert not {name.split(".")[0] for name in names(path)} & {"configs", "tests", "examples", "train"}, path


@pytest.mark.slow
def test_the_readmes_example_and_a_run_work_where_only_the_wheel_is_installed(wheel, workdir, tmp_path):
    """The wheel in an environment of its own; what it depends on is lent by this one, to spare the downloads."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(purelib, capture_output=True, text=True, check=True).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)  # what pip does with a wheel that holds Python alone
    (tmp_path / "empty").mkdir()

    def run(code):
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
        return subprocess.run([python, "-c", code], cwd=tmp_path / "empty", env=clean, capture_output=True, text=True)

    assert "No module named 'jax'" in run("import jax").stderr  # it is empty
    lent = [path for path in sys.path if path.endswith("site-packages")]
    pathlib.Path(site, "lent.pth").write_text("\n".join(lent))
    assert run("import hga_flax; print(hga_flax.__file__)").stdout.startswith(site)
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    result = run(program)
    assert result.stdout == "(2, 56, 56, 64)\n", result.stderr
    evaluate = "from hga_flax.training.restore import evaluate_workdir; print(evaluate_workdir({!r})['num_examples'])"
    result = run(evaluate.format(str(workdir)))
    assert result.stdout.splitlines()[-1:] == ["297"], result.stderr
    summary = (
        f"import sys; sys.argv[1:] = ['summary', '--workdir={workdir}']; from hga_flax.__main__ import main; main()"
    )
    assert "cifar_resnet8, attention hga" in (result := run(summary)).stdout, result.stderr
