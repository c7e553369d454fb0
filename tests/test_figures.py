"""The committed figures are what their scripts draw."""

import pathlib
import runpy
import xml.etree.ElementTree as ElementTree

FIGURES = pathlib.Path(__file__).parent.parent / "docs" / "figures"


def test_the_block_figure_is_what_its_script_draws():
    drawn = runpy.run_path(str(FIGURES / "draw_hga_block.py"))["draw"]()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert drawn == (FIGURES / "hga_block.svg").read_text(encoding="utf-8")
