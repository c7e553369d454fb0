import os
import shutil

import cv2
import numpy as np
import pytest

from hga_flax.__main__ import main
from hga_flax.data.sources import DatasetInfo, SyntheticSource
from hga_flax.errors import UserError
from hga_flax.pictures.explain import gate_rows, read_images, short_names
from hga_flax.pictures.views import explain
from hga_flax.training.restore import evaluate_workdir
from tests import commands

IMAGES = 3


@pytest.fixture(scope="module")
def runs(short_run, tmp_path_factory):
    """Two runs, one the copy of the other, and files of the images that they are evaluated on."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("hga", "copy"):
        shutil.copytree(short_run, folder / name)
    source = SyntheticSource(48, 8, DatasetInfo("digits", 10, 1, ()))
    for i in range(48):
        cv2.imwrite(str(folder / f"{i}.png"), source[i]["image"])
    return folder


@pytest.mark.medium
def test_the_classes_are_those_that_evaluation_finds(runs):
    encoded = [(str(i), (runs / f"{i}.png").read_bytes()) for i in range(48)]
    view = explain(str(runs / "hga"), "latest", encoded, None)
    source = SyntheticSource(48, 8, DatasetInfo("digits", 10, 1, ()))
    wrong = sum(title.split(" ")[0] != str(source[i]["label"]) for i, title in enumerate(view.titles))
    assert 100 * wrong / 48 == pytest.approx(evaluate_workdir(str(runs / "hga"), "latest")["top1_error"])
    assert view.cams.shape == (48, 2, 2) and len(view.blocks) == 3
    assert [row[0] for row in gate_rows(view.blocks)] == ["stage1_block1", "stage2_block1", "stage3_block1"]


@pytest.mark.medium
def test_several_runs_and_images_as_a_subprocess(runs, tmp_path):
    files = [str(runs / f"{i}.png") for i in range(IMAGES)]
    flags = [f"--workdir={runs / name}" for name in ("copy", "hga")]
    result = commands.run("-m", "hga_flax", "explain", *flags, *files, "--class=4", f"--out={tmp_path / 'e.png'}",
                          "--checkpoint=latest")  # fmt: skip
    assert result.returncode == 0, result.stderr
    pixels = cv2.imread(str(tmp_path / "e.png"))
    assert pixels.shape[1] > 1000 and np.unique(pixels).size > 100
    rows = [line.split() for line in result.stdout.splitlines() if ".png" in line and not line.startswith("written")]
    assert [row[:3] for row in rows] == [[f"{i}.png", run, "4"] for i in range(IMAGES) for run in ("copy", "hga")]
    assert "stage3_block1" in result.stdout and "4x4" in result.stdout


@pytest.mark.medium
def test_a_folders_images_are_taken_and_a_broken_one_is_left_out(runs, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(runs / "0.png", tmp_path / folder / "0.png")
    (tmp_path / "b" / "1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^1 of 3 images could not be explained"):
        main(["explain", f"--workdir={runs / 'hga'}", str(tmp_path), f"--out={tmp_path / 'e.svg'}"])
    said = capsys.readouterr()
    assert said.err.count("1.png: the image of 6 bytes cannot be decoded") == 1
    rows = [line.split()[0] for line in said.out.splitlines() if "0.png" in line]
    assert rows == ["a/0.png", "b/0.png"] and (tmp_path / "e.svg").exists()


def test_names_show_as_many_folders_as_tell_them_apart():
    paths = ["x/circle/0.png", "x/ring/0.png", "1.png", "y/2.png", "y/2.png", "a/q/3.png", "b/q/3.png", "3.png"]
    names = ["circle/0.png", "ring/0.png", "1.png", "2.png", "2.png", "a/q/3.png", "b/q/3.png", "3.png"]
    assert short_names(paths) == names
    assert short_names([os.fsdecode(b"caf\xe9.png")]) == ["caf\\xe9.png"]  # else it could not be drawn


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(UserError, match="it is not a regular file"):
        read_images([str(tmp_path / "p.png")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0.png", "--workdir=absent"], "no run here"),
        (["absent.png", "--workdir=hga"], "absent.png cannot be read: No such file"),
        (["hga", "--workdir=hga"], "hga: a folder without images"),
        (["absent.png", "hga/config.json", "--workdir=hga"], "none of 2 images could be explained"),
        (["hga/config.json", "--workdir=hga"], "hga/config.json: the image of .* bytes cannot be decoded"),
        (["0.png", "--workdir=hga", "--class=10"], "--class=10: hga has no such class"),
        (["0.png", "--workdir=hga", "--checkpoint=7"], "checkpoint=7: choose best"),
        (["0.png", "--workdir=hga", "--out=e.gif"], "must end in .png"),
        ([".", "--workdir=hga"], "48 images: a picture holds at most 16"),
        (["0.png"], "--workdir=DIR is missing"),
    ],
)
def test_bad_input_is_one_line(runs, arguments, message, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match=message):
        main(["explain", *arguments])
    assert not list(runs.glob("explain*"))
