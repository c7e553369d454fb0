"""Error against cost as pictures."""

import cv2
import pytest

from hga_flax.errors import UserError
from hga_flax.lab.plots import plot
from hga_flax.lab.results import analyse
from tests.lab.test_tables import gathered


def test_a_picture_of_each_cost_that_is_known(tmp_path):
    told = analyse(gathered(step_ms=3.0))
    png, svg = plot(told, tmp_path / "new")
    assert [png.name, svg.name] == ["made_up.png", "made_up.svg"]
    picture = cv2.imread(str(png))
    assert picture.shape[0] > 400 and picture.std() > 10
    drawn = svg.read_text()
    for cost in ("parameters", "MFLOPs an image", "training step, ms"):
        assert cost in drawn
    assert plot(told, tmp_path)[1].read_text() == drawn  # the same results are the same file
    assert "training step" not in plot(analyse(gathered()), tmp_path)[1].read_text()


def test_nothing_to_draw_and_nowhere_to_draw_it(tmp_path):
    nothing = gathered()
    for row in nothing["rows"]:
        row["runs"] = []
    assert plot(analyse(nothing), tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        plot(analyse(gathered()), tmp_path / "file")
