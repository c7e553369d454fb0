import re
import shutil
import tomllib

import hga_flax
from hga_flax import version
from tests.commands import ROOT


def test_there_is_one_version_and_the_package_is_built_with_it():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", hga_flax.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    home, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(__import__(home, fromlist=[name]), name) == hga_flax.__version__


def test_an_edited_copy_of_the_code_has_another_version(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "hga_flax", tmp_path / "hga_flax", ignore=shutil.ignore_patterns("__pycache__"))
    own = version.version_of_code()
    assert re.fullmatch(rf"{re.escape(version.__version__)} \(code [0-9a-f]{{8}}\)", own)
    monkeypatch.setattr(version, "__file__", str(tmp_path / "hga_flax" / "version.py"))
    assert version.version_of_code.__wrapped__() == own
    with open(tmp_path / "hga_flax" / "data" / "streams.py", "a") as file:
        file.write("# changed\n")
    assert version.version_of_code.__wrapped__() != own


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {hga_flax.__version__}\n" in citation
