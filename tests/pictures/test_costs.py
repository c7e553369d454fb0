"""Error against cost as pictures."""

import cv2
import pytest

from hga_flax.errors import UserError
from hga_flax.lab.results import analyse
from hga_flax.pictures.costs import draw_costs
from tests.lab.test_tables import gathered


def test_a_picture_of_each_cost_that_is_known(tmp_path):
    told = analyse(gathered(step_ms=3.0))
    png, svg = draw_costs(told, tmp_path, "top-1 error, %")
    assert [png.name, svg.name] == ["made_up.png", "made_up.svg"]
    picture = cv2.imread(str(png))
    assert picture.shape[0] > 300 and picture.std() > 10
    drawn = svg.read_text()
    for cost in ("top-1 error, %", "parameters", "MFLOPs an image", "training step, ms"):
        assert cost in drawn
    assert draw_costs(told, tmp_path, "top-1 error, %")[1].read_text() == drawn  # the same results are the same file
    assert "training step" not in draw_costs(analyse(gathered()), tmp_path, "")[1].read_text()


def test_nothing_to_draw_and_nowhere_to_draw_it(tmp_path):
    nothing = gathered()
    for row in nothing["rows"]:
        row["runs"] = []
    assert draw_costs(analyse(nothing), tmp_path, "") == []
    with pytest.raises(UserError, match="cannot be written"):
        draw_costs(analyse(gathered()), tmp_path / "absent", "")
