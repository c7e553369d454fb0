import pytest

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
