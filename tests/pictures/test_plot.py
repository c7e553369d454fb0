import json
import pathlib
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError
from hga_flax.pictures import style
from hga_flax.pictures.curves import read_run
from hga_flax.pictures.plot import draw
from hga_flax.runs.workdir import write_config
from tests import commands
from tests.training import tiny

TRAIN, EVAL = {2: 2.0, 4: 1.0, 6: 0.5}, {3: 60.0, 6: 7.5}


def workdir(folder, **overrides):
    folder.mkdir()
    write_config(folder, tiny.config(**overrides))
    rows = [{"step": step, "train/loss": v, "train/top1_error": 10 * v} for step, v in TRAIN.items()]
    rows += [{"step": step, "eval/loss": v / 10, "eval/top1_error": v} for step, v in EVAL.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{damaged\n")
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    paper = {
        "data__name": "cifar10",
        "data__fake": False,
        "model__name": "cifar_preact_resnet110",
        "model__options": "",
    }
    return [workdir(tmp_path / "a", **paper), workdir(tmp_path / "b")]


def drawn(runs, metrics, log=False):
    with style.styled():
        return draw([read_run(run, None, False) for run in runs], metrics, "step", log)


def test_what_is_drawn_is_what_the_file_holds(runs):
    loss, error, *_ = drawn(runs, ["loss", "top1_error"]).axes
    lines = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in loss.lines]
    assert lines == 2 * [list(TRAIN.items()), [(step, value / 10) for step, value in EVAL.items()]]
    evaluation = error.lines[1]
    assert list(evaluation.get_ydata()) == list(EVAL.values()) and evaluation.get_marker() == "o"
    assert evaluation.get_linewidth() > 2 * error.lines[0].get_linewidth()
    assert error.get_ylabel() == "top-1 error (%)" and error.get_xlabel() == "step"
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in error.lines[:4:2]}) == 2


def test_the_papers_value_is_a_dashed_line_where_there_is_one(runs):
    loss, error = drawn(runs, ["loss", "top1_error"]).axes[:2]
    assert len(loss.lines) == 4 and len(error.lines) == 5
    assert set(error.lines[-1].get_ydata()) == {4.52} and error.lines[-1].get_linestyle() == "--"
    assert [text.get_text() for text in error.texts] == ["paper, Table 4: 4.52 %"]
    assert not drawn(runs[1:], ["top1_error"]).axes[0].texts


def test_the_legend_names_the_runs_and_log_is_logarithmic(runs):
    figure = drawn(runs, ["loss"], log=True)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["a (cifar_preact_resnet110, hga)", "b (cifar_resnet8, hga)", "thin: training", "bold: evaluation"]
    assert figure.axes[0].get_yscale() == "log" and drawn(runs, ["loss"]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("metrics", [["loss"], ["loss", "top1_error"]])
def test_the_legend_lies_within_the_picture(runs, tmp_path, metrics):
    for names in (runs[1:], runs, [*runs, *(workdir(tmp_path / f"{i}_rather_long") for i in range(3))]):
        figure = drawn(names, metrics)
        figure.draw_without_rendering()
        assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


def test_runs_of_equal_names_are_told_apart_by_their_folders(tmp_path, capsys):
    for row in ("hga", "hga_relu"):
        (tmp_path / row).mkdir()
    paths = [workdir(tmp_path / row / f"seed_{seed}") for row in ("hga", "hga_relu") for seed in (0, 1)]
    main(["plot", *paths, workdir(tmp_path / "other"), f"--out={tmp_path / 'c.png'}"])
    said = capsys.readouterr().out
    for name in ("hga/seed_0 (", "hga/seed_1 (", "hga_relu/seed_0 (", "hga_relu/seed_1 (", "\nother ("):
        assert said.count(name) == 2  # in the table, and beside the damaged line


def test_zeros_alone_on_a_logarithmic_axis_are_drawn_on_a_plain_one(runs, tmp_path, recwarn):
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/bad_images": 0}))
    figure = drawn(runs[1:], ["bad_images"], log=True)
    figure.draw_without_rendering()
    assert figure.axes[0].get_yscale() == "linear" and not recwarn.list


def test_a_training_loss_that_is_another_quantity_is_not_drawn(runs, tmp_path, capsys):
    runs.append(workdir(tmp_path / "c", training__loss="binary_cross_entropy"))
    figure = drawn(runs[1:], ["loss", "top1_error"])
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3, 2, 2]
    assert [len(line.get_xdata()) for line in figure.axes[1].lines] == [3, 2, 3, 2]
    assert "thin: training (loss: not binary_cross_entropy)" in [t.get_text() for t in figure.legends[0].get_texts()]
    main(["plot", *runs, f"--out={tmp_path / 'c.png'}"])
    said = [line for line in capsys.readouterr().out.splitlines() if "training loss" in line]
    assert said == [
        "c (cifar_resnet8, hga): its training loss is binary_cross_entropy, unlike the evaluation's: not drawn"
    ]


def test_a_single_point_lies_within_the_axes(runs, tmp_path):
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps({"step": 47, "eval/top1_error": 12.5}))
    for log in (False, True):
        axes = drawn(runs[1:], ["top1_error"], log).axes[0]
        assert axes.get_ylim()[1] > 1.03 * 12.5 and axes.get_xlim()[1] > 1.03 * 47


@pytest.mark.parametrize("least", [0.1, 1, 12, 50])
def test_a_logarithmic_axis_has_several_labels(runs, tmp_path, least):
    rows = [{"step": 1, "eval/top1_error": least}, {"step": 2, "eval/top1_error": 90}]
    (tmp_path / "b" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    axes = drawn(runs[1:], ["top1_error"], log=True).axes[0]
    low, high = axes.get_ylim()
    assert 4 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 10


@pytest.mark.medium
def test_the_command_writes_both_files_and_tells_the_last_and_best(runs, tmp_path):
    result = commands.run("-m", "hga_flax", "plot", *runs, f"--out={tmp_path / 'c'}", "--label=one", "--label=two")
    assert result.returncode == 0, result.stderr
    pixels = cv2.imread(str(tmp_path / "c.png"))
    assert pixels.shape[1] > 1000 and np.unique(pixels).size > 20
    assert ElementTree.parse(tmp_path / "c.svg").getroot().tag.endswith("svg")
    assert "one" in result.stdout and "7.5 (7.5)" in result.stdout
    assert "two: 1 damaged line of metrics.jsonl left out" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric=loss,top_error"], "--metric=top_error: no run logged it; did you mean 'top1_error'"),
        (["--label=one"], "--label: 1 for 2 runs"),
        (["b/"], "b/: given twice"),
        (["--out=absent/c.png"], "there is no folder absent"),
        (["--x=epoch"], "its epochs are not known, try --x=step"),
        (["/nowhere"], "/nowhere: no run here"),
    ],
)
def test_bad_input_is_one_line(runs, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["plot", *runs, *arguments])
    assert not list(tmp_path.glob("curves*"))


@pytest.mark.parametrize("flags", [[], ["--log"]])
def test_a_run_that_diverged_at_once_is_drawn(tmp_path, flags):
    run = pathlib.Path(workdir(tmp_path / "d"))
    rows = [{"step": step, "train/loss": None, "eval/loss": None, "eval/top1_error": 90.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["plot", str(run), f"--out={tmp_path / 'c.png'}", *flags])
    assert (tmp_path / "c.png").stat().st_size


def test_the_last_value_is_that_of_a_diverged_evaluation_too(runs, tmp_path, capsys):
    with open(f"{runs[1]}/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "eval/loss": None, "eval/top1_error": 90.0}) + "\n")
    main(["plot", runs[1], f"--out={tmp_path / 'c.png'}", "--label=cost_$5_$10"])  # no formula
    said = capsys.readouterr().out
    assert "nan (0.75)" in said and "90 (7.5)" in said and "cost_$5_$10" in said
