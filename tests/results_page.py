"""The tables in RESULTS.md, which are those of the saved reports: `python -m tests.results_page` writes them anew."""

import pathlib
import re

from hga_flax.lab.results import analyse, load
from hga_flax.lab.tables import render
from tests.commands import ROOT

PAGE = ROOT / "RESULTS.md"
TABLE = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)


def updated(text: str) -> str:
    """Returns the page with every table replaced by that of its report."""

    def table(found: re.Match) -> str:
        report = load(str(ROOT / found[1]))
        return f"<!-- {found[1]} -->\n{render(analyse(report), 'markdown')}<!-- end -->"

    return TABLE.sub(table, text)


def reports(text: str) -> list[pathlib.Path]:
    """Returns the reports that the page shows."""
    return [ROOT / name for name in TABLE.findall(text)]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
    print(f"wrote {PAGE}")
