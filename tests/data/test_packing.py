import pytest

from hga_flax.data import packing
from hga_flax.data.packing import check_name, write_once
from hga_flax.errors import UserError


def test_what_is_written_appears_whole_or_not_at_all(tmp_path):
    def half(folder):
        (folder / "a").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_once(tmp_path, "mine", "1.0.0", half)
    assert not (tmp_path / "mine" / "1.0.0").exists()

    def whole(folder):
        made = folder / "mine" / "1.0.0"
        made.mkdir(parents=True)
        (made / "a").write_text("whole")

    written = write_once(tmp_path, "mine", "1.0.0", whole)
    assert written == tmp_path / "mine" / "1.0.0" and (written / "a").read_text() == "whole"
    assert [p.name for p in (tmp_path / "mine").iterdir() if p.is_dir()] == ["1.0.0"]  # nothing of the first is left


@pytest.mark.parametrize("name", ["", "../x", "a/b", "1st", "a b"])
def test_names_that_are_no_data_set_are_refused(name):
    with pytest.raises(UserError):
        check_name(name)
    assert check_name("my_set") == "my_set"


def test_a_log_gets_a_line_now_and_then_and_the_number_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(packing, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(packing.counted(iter("abc"), "letters")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["letters: 1 so far", "letters: 2 so far", "letters: 3 so far", "letters: 3"]
    monkeypatch.setattr(packing, "SECONDS_BETWEEN_LINES", 10.0)
    assert list(packing.counted(iter("abc"), "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == ["letters: 3"]
