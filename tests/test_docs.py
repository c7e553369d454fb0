"""The pages of docs/: what they show comes from the code, what they name exists, and they build without a warning."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import hga_flax
from hga_flax.__main__ import COMMANDS
from hga_flax.attention import attention_names
from tests.commands import ROOT
from tests.docs_tables import ATTENTIONS, PAGE, module_counts, written

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", without_code(TEXT[page.name])):
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        if anchor and target.name != "api.md":  # its anchors are made by the build below
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_tables_of_the_attentions_are_what_the_code_says():
    assert written(TEXT[PAGE.name]) == TEXT[PAGE.name], "write them anew: python -m tests.docs_tables"
    assert [*ATTENTIONS] == [name for name in attention_names() if name != "none"]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_formula_gives_the_parameters(name):
    formula = ATTENTIONS[name][3]
    for channels in (64, 256, 1024):
        assert module_counts(name, channels, 7)[0] == formula(channels), channels


def test_every_shipped_configuration_is_named():
    shipped = {path.name for path in (ROOT / "configs").glob("*.py")} - {"__init__.py", "base.py"}
    assert set(re.findall(r"`configs/(\w+\.py)`", TEXT["configs.md"])) - {"base.py"} == shipped


def test_every_public_name_is_in_the_reference():
    named = set(re.findall(r"^::: hga_flax\.(\w+)$", TEXT["api.md"], flags=re.MULTILINE))
    assert named == set(hga_flax.__all__) - {"__version__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_are_python_and_import_what_exists(page):
    for program in re.findall(r"```python\n(.*?)```", TEXT[page.name], flags=re.DOTALL):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and node.module == "hga_flax":
                assert {alias.name for alias in node.names} <= set(hga_flax.__all__), program


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"python -m hga_flax (\w+)", TEXT[page.name]):
        assert name in COMMANDS, name
    for name in re.findall(r"(?:^    |`)make ([a-z-]+)", TEXT[page.name], flags=re.MULTILINE):
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name
    for module in re.findall(r"python -m ((?:examples|tests)\.\w+)", TEXT[page.name]):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module


def build(folder, more=""):
    """Builds a copy of the pages strictly in `folder`, with `more` at the end of the first; returns the process."""
    for part in ("docs", "configs"):  # a page shows a configuration; Zensical reads nothing outside its folder
        shutil.copytree(ROOT / part, folder / part)
    with open(folder / "docs" / "index.md", "a") as page:
        page.write(more)
    (folder / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text().replace("paths: [.]", f"paths: [{ROOT}]"))
    zensical = pathlib.Path(sys.executable).parent / "zensical"
    return subprocess.run([zensical, "build", "--strict"], cwd=folder, capture_output=True, text=True)


def test_the_pages_build_strictly_and_load_nothing_from_elsewhere(tmp_path):
    result = build(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    site = tmp_path / "site"
    assert {page.stem for page in PAGES[1:]} <= {page.stem for page in site.glob("*.html")}
    for page in site.glob("*.html"):
        # What a browser fetches by itself; links that a reader may follow are no matter.
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"?(http[^\s\">]*)", page.read_text())
        assert not fetched, (page.name, fetched)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?http", sheet.read_text()), sheet
    api, configs = (site / "api.html").read_text(), (site / "configs.html").read_text()
    for name in set(hga_flax.__all__) - {"__version__"}:
        assert f'id="hga_flax.{name}"' in api, name
    assert "weight_decay" in configs and "-8&lt;-" not in configs  # base.py was put in


def test_a_broken_link_is_an_error(tmp_path):
    result = build(tmp_path, "\n[away](nowhere.md) [off](data.md#nothing)\n")
    assert result.returncode == 1
    assert "page does not exist" in result.stdout + result.stderr
    assert "anchor does not exist" in result.stdout + result.stderr
