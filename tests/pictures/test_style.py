import matplotlib
import pytest
from matplotlib.figure import Figure

from hga_flax.errors import UserError
from hga_flax.pictures import style


def test_the_ending_says_what_is_written(tmp_path):
    assert style.output_files(f"{tmp_path}/a.SVG") == [tmp_path / "a.SVG"]
    assert style.output_files(f"{tmp_path}/a") == [tmp_path / "a.png", tmp_path / "a.svg"]


@pytest.mark.parametrize(
    ("out", "message"), [("a.gif", "must end in .png"), ("absent/a.png", "there is no folder"), (".", "a folder")]
)
def test_what_cannot_be_written_is_said_before_anything_is_drawn(tmp_path, out, message):
    with pytest.raises(UserError, match=message):
        style.output_files(str(tmp_path / out))


def test_the_same_figure_is_the_same_file_whatever_the_users_style(tmp_path):
    def write(name):
        with style.styled():
            figure = Figure(figsize=(2, 1))
            figure.subplots().plot([1, 2], label="a")
            style.save(figure, style.output_files(str(tmp_path / name)))
        return [(tmp_path / f"{name}.{ending}").read_bytes() for ending in ("png", "svg")]

    first = write("a")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert write("b") == first
    assert first[0].startswith(b"\x89PNG") and b"</svg>" in first[1]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a.png").mkdir()
    with style.styled(), pytest.raises(UserError, match=r"a\.png cannot be written: Is a directory"):
        style.save(Figure(figsize=(1, 1)), [tmp_path / "a.png"])


def test_neighbouring_colours_and_greys_are_told_apart():
    """In grey print neighbours differ by lightness, or by marker and line."""
    assert len(set(style.COLOURS)) == len(style.COLOURS)
    assert len(set(style.MARKERS)) == len(style.MARKERS)
    looks = {(style.LINES[i % len(style.LINES)], style.MARKERS[i]) for i in range(len(style.MARKERS))}
    assert len(looks) == len(style.MARKERS)
