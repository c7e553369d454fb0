import pytest

from hga_flax.data.sources import DatasetInfo
from hga_flax.errors import UserError
from hga_flax.training import workdir as w
from tests.training import tiny


def test_it_is_created_and_probed(tmp_path):
    folder = w.open_workdir(str(tmp_path / "a" / "b"))
    assert folder.is_dir() and list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in ("/dev/null/x", "/proc/x", str(tmp_path / "file")):
        with pytest.raises(UserError, match=f"--workdir={bad} cannot be written to: ") as caught:
            w.open_workdir(bad)
        assert "\n" not in str(caught.value)


def test_config_and_dataset_are_read_back(tmp_path):
    config, info = tiny.config(), DatasetInfo("x", 2, 3, ("cat", "dog"))
    w.write_config(tmp_path, config)
    w.write_dataset(tmp_path, info)
    assert w.read_config(tmp_path).to_dict() == config.to_dict()
    assert w.read_dataset(tmp_path) == info


def test_another_models_workdir_is_refused_and_other_changes_are_told(tmp_path):
    assert w.check_same_run(tmp_path, tiny.config()) == []
    w.write_config(tmp_path, tiny.config())
    assert w.check_same_run(tmp_path, tiny.config(training__steps=9)) == ["training.steps: 6 -> 9"]
    with pytest.raises(UserError, match=r"there model\.attention is 'hga', here 'none'; choose another --workdir"):
        w.check_same_run(tmp_path, tiny.config(model__attention="none"))


DAMAGED = (
    '{"name": 3, "num_classes": 2, "channels": 1, "class_names": []}',
    '{"name": "x", "num_classes": "2", "channels": 1, "class_names": []}',
    '{"name": "x", "num_classes": -2, "channels": 1, "class_names": []}',
    '{"name": "x", "num_classes": 2, "channels": 1, "class_names": [], "more": 1}',
    "[" * 100_000,
)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_description_of_the_data_is_one_line(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        w.read_dataset(tmp_path)


def test_no_folder_and_no_home_are_one_line():
    with pytest.raises(UserError, match="--workdir is empty"):
        w.open_workdir("")
    with pytest.raises(UserError, match="--workdir=~nobody_here/x: the home folder is not known"):
        w.open_workdir("~nobody_here/x")


@pytest.mark.parametrize("text", ["", "{", '{"name": 3}', "[]", "[" * 100_000])
def test_damaged_files_are_one_line(tmp_path, text):
    with pytest.raises(UserError, match="no run here"):
        w.read_config(tmp_path)
    (tmp_path / "config.json").write_text(text if text != '{"name": 3}' else "[1]")
    (tmp_path / "dataset.json").write_text(text)
    for read in (w.read_config, w.read_dataset):
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path)


def test_write_text_leaves_nothing_else(tmp_path):
    w.write_text(tmp_path / "f", "a")
    w.write_text(tmp_path / "f", "b")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "b"
