"""Error against cost as pictures."""

import itertools

import cv2
import pytest

from hga_flax.errors import UserError
from hga_flax.lab.results import analyse, load
from hga_flax.lab.study import load_study
from hga_flax.pictures import costs
from hga_flax.pictures.costs import draw_costs, look
from tests.commands import ROOT
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


def test_a_row_without_a_cost_is_drawn_too(tmp_path):
    drawn = draw_costs(analyse(gathered(params=None, gflops=None)), tmp_path, "")[1].read_text()
    assert drawn.count("<!-- se -->") == 2 and drawn.count("<!-- unknown -->") == 2


def test_no_two_rows_look_the_same():
    looks = [tuple(look(i).values()) for i in range(84)]
    assert len(set(looks)) == 84
    marker = [marker for marker, _ in looks]
    assert len(set(marker[:12])) == 12  # so that up to a dozen rows are told apart in grey as well


@pytest.mark.parametrize("study", sorted((ROOT / "studies").glob("*.py")), ids=lambda path: path.stem)
def test_no_two_rows_of_a_shipped_study_share_marker_and_colour(study, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = load_study(str(study), check=False).rows
    assert len({tuple(look(i).values()) for i, _ in enumerate(rows)}) == len(rows)


@pytest.mark.parametrize("report", sorted((ROOT / "results" / "studies").glob("*.json")), ids=lambda path: path.stem)
def test_no_two_points_of_a_saved_report_lie_on_each_other(report, tmp_path, monkeypatch):
    told, figures = analyse(load(str(report))), []
    monkeypatch.setattr(costs, "save", lambda figure, files: figures.append(figure))
    draw_costs(told, tmp_path, "top-1 error, %")
    for axis in figures[0].axes:
        points = sorted(line.get_xydata()[0][0] for line in axis.lines if len(line.get_xydata()) == 1)
        shown = [row for row in told["rows"] if row["mean"] is not None]
        places = sorted({x for x in points})
        assert len(places) == len(shown) and min(b - a for a, b in itertools.pairwise(places)) == 1
        names = {text.get_text(): text for text in axis.texts}
        assert set(names) == {row["row"] for row in shown}
        figures[0].draw_without_rendering()
        frame = axis.get_window_extent()
        for name, text in names.items():  # written inside, so that none is cut off or lies on the title
            box = text.get_window_extent()
            assert frame.y0 - 2 <= box.y0 and box.y1 <= frame.y1 + 2, name
        costs_shown = [label.get_text().replace(",", "") for label in axis.get_xticklabels()]
        assert [float(cost) for cost in costs_shown] == sorted(float(cost) for cost in costs_shown)


def test_nothing_to_draw_and_nowhere_to_draw_it(tmp_path):
    nothing = gathered()
    for row in nothing["rows"]:
        row["runs"] = []
    assert draw_costs(analyse(nothing), tmp_path, "") == []
    with pytest.raises(UserError, match="cannot be written"):
        draw_costs(analyse(gathered()), tmp_path / "absent", "")
