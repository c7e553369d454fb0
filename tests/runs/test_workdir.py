import errno
import os
import subprocess
import sys
import tempfile

import pytest

from hga_flax.data.sources import DatasetInfo
from hga_flax.errors import UserError
from hga_flax.runs import workdir as w
from tests.training import tiny


def test_it_is_created_and_probed(tmp_path):
    folder = w.open_workdir(str(tmp_path / "a" / "b"))
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_what_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for bad, why in (
        (tmp_path / "file", f"{tmp_path}/file is a file, not a folder"),
        (tmp_path / "file" / "a" / "b", f"{tmp_path}/file is a file, not a folder"),
        (tmp_path / "dangling", f"{tmp_path}/dangling is a link to nowhere, which does not exist"),
        (tmp_path / "dangling" / "a", f"{tmp_path}/dangling is a link to nowhere, which does not exist"),
        (tmp_path / "circle" / "a", f"{tmp_path}/circle is a link to circle, which does not exist"),
        ("/dev/null/x", "/dev/null is a file, not a folder"),
        ("/proc/x", "No such file or directory"),
    ):
        with pytest.raises(UserError) as caught:
            w.open_workdir(str(bad))
        assert str(caught.value) == f"--workdir={bad} cannot be written to: {why}; choose another folder"
    assert w.open_workdir(str(tmp_path / "link" / "a")).is_dir()


@pytest.mark.parametrize("name", ["[1]", "a*", "what?", "a\\b", os.fsdecode(b"caf\xe9")], ids=ascii)
def test_a_path_below_which_checkpoints_would_be_lost_is_refused(tmp_path, name):
    for path in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(UserError, match=r"checkpoints (may be lost below a path with|need a path in UTF-8)"):
            w.open_workdir(str(path))
    assert not any(tmp_path.iterdir())


def test_a_folder_without_the_right_to_write_is_one_line(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written to: Permission denied; choose another folder"):
        w.open_workdir(str(tmp_path))


PROBE = """
import sys
from hga_flax.errors import run_main
from hga_flax.runs.workdir import open_workdir
def main():
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(200):
        open_workdir(sys.argv[1])
run_main(main)
"""


def test_four_processes_start_200_times_at_once_in_a_shared_folder(tmp_path):
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([sys.executable, "-c", PROBE, str(tmp_path)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(4)
    ]
    assert [process.stdout.readline() for process in started] == 4 * ["ready\n"]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [(process.communicate()[1], process.returncode) for process in started] == 4 * [("", 0)]
    assert list(tmp_path.iterdir()) == []


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


def test_checkpoints_of_nobody_knows_which_run_are_refused(tmp_path):
    """As a run may leave that is still going while its folder is removed and another one starts there."""
    assert w.check_same_run(tmp_path, tiny.config()) == []
    (tmp_path / "checkpoints" / "562").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json, .*; put it back, or choose another"):
        w.check_same_run(tmp_path, tiny.config())


def test_the_real_data_set_is_not_that_of_synthetic_images(tmp_path):
    w.write_config(tmp_path, tiny.config(data__fake=True))
    with pytest.raises(UserError, match=r"belongs to another run: there data\.fake is 'True', here 'False'"):
        w.check_same_run(tmp_path, tiny.config(data__fake=False))


def test_options_in_another_spelling_are_the_same(tmp_path):
    w.write_config(tmp_path, tiny.config(model__options="features=4, dropout=0.0"))
    w.check_same_run(tmp_path, tiny.config(model__options="dropout=0.0,features=4,"))
    with pytest.raises(UserError, match=r"there model\.options is"):
        w.check_same_run(tmp_path, tiny.config(model__options="features=8, dropout=0.0"))


def test_a_run_with_checkpoints_keeps_its_batch_size(tmp_path):
    w.write_config(tmp_path, tiny.config())
    other = tiny.config(training__batch_size=8 * tiny.config().training.batch_size)
    assert len(w.check_same_run(tmp_path, other)) == 1  # nothing is saved yet
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-17").mkdir(parents=True)
    assert len(w.check_same_run(tmp_path, other)) == 1 and not w.has_checkpoints(tmp_path)
    (tmp_path / "superseded" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"counts steps of \d+ images\. Keep the size .*init\.weights="):
        w.check_same_run(tmp_path, other)


def test_a_run_with_checkpoints_keeps_its_normalisation(tmp_path):
    """config.json is that of the last session, and every checkpoint is evaluated with it."""
    w.write_config(tmp_path, tiny.config())
    other = tiny.config(data__mean=(0.9,))
    assert w.check_same_run(tmp_path, other) == ["data.mean: (0.5,) -> (0.9,)"]
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^data\.mean: \(0\.5,\) -> \(0\.9,\): the checkpoints in .*init\.weights="):
        w.check_same_run(tmp_path, other)


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


def test_no_folder_and_no_home_are_one_line(tmp_path):
    for path in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "a"):
        with pytest.raises(UserError, match=r"^--workdir=.*: File name too long; choose another path$"):
            w.open_workdir(str(path))
    with pytest.raises(UserError, match="--workdir is empty"):
        w.open_workdir("")
    with pytest.raises(UserError, match="--workdir=~nobody_here/x: the home folder is unknown"):
        w.open_workdir("~nobody_here/x")


@pytest.mark.parametrize("text", ["", "{", '{"name": 3}', "[]", "[" * 100_000, '{"data": 5}', '{"seed": {"x": 1}}'])
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


def test_a_data_set_with_a_class_twice_is_not_read(tmp_path):
    (tmp_path / "dataset.json").write_text(
        '{"name": "folder", "num_classes": 2, "channels": 3, "class_names": ["cat", "cat"], "num_examples": {}}'
    )
    with pytest.raises(UserError, match=r"dataset\.json cannot be read: it does not name 2 different classes"):
        w.read_dataset(tmp_path)
