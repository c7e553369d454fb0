import re
import tomllib

import hga_flax
from tests.commands import ROOT


def test_there_is_one_version_and_the_package_is_built_with_it():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", hga_flax.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    home, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(__import__(home, fromlist=[name]), name) == hga_flax.__version__


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {hga_flax.__version__}\n" in citation
