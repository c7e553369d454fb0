import csv
import io
import json
import os
import shlex
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from hga_flax.training.restore import evaluate_workdir
from tests import commands
from tests.training import tiny


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of the held-out digits, named by place and label."""
    folder = tmp_path_factory.mktemp("pictures")
    for place, (image, label) in enumerate(zip(*tiny.held_out_digits(), strict=True)):
        (folder / f"{place:03}_{label}.png").write_bytes(image)
    return folder


def predict(workdir, *arguments, **options):
    """Returns the finished process; run from elsewhere, so that file names are free."""
    return subprocess.run(
        commands.command(commands.ROOT / "predict.py", f"--workdir={workdir}", *arguments),
        env=commands.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.mark.medium
def test_the_digits_of_the_split_as_files_agree_with_evaluate(workdir, pictures):
    result = predict(workdir, pictures, "--top=10", "--json")
    assert result.returncode == 0 and result.stderr == ""
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["file"] for row in rows] == sorted(str(file) for file in pictures.iterdir())
    labels = [row["file"][-5] for row in rows]
    evaluated = evaluate_workdir(str(workdir))
    wrong = np.mean([row["predictions"][0]["class"] != label for row, label in zip(rows, labels, strict=True)])
    assert 100 * wrong == pytest.approx(evaluated["top1_error"])
    shares = [{p["class"]: p["probability"] for p in row["predictions"]} for row in rows]
    of_label = [share[label] for share, label in zip(shares, labels, strict=True)]
    assert -np.log(of_label).mean() == pytest.approx(evaluated["loss"], rel=1e-5)
    for row in rows:
        probabilities = [p["probability"] for p in row["predictions"]]
        assert len(probabilities) == 10 and sum(probabilities) == pytest.approx(1)
        assert probabilities == sorted(probabilities, reverse=True)
        assert all(p["class"] == str(p["index"]) for p in row["predictions"])


@pytest.mark.medium
def test_a_bad_file_is_named_and_the_rest_go_on(workdir, pictures, tmp_path):
    (tmp_path / "a, b.png").write_bytes(next(iter(sorted(pictures.iterdir()))).read_bytes())
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    listing = "absent.png\n" + os.path.relpath(pictures, tmp_path) + "/00[12]_*.png\n"
    result = predict(workdir, "*.png", "-", "--top=2", "--csv", cwd=tmp_path, input=listing)
    assert result.returncode == 1
    errors = result.stderr.splitlines()
    assert errors[0].startswith("cut.png: ") and errors[1] == "absent.png: No such file or directory"
    assert errors[2].startswith("error: could not label 2 of 5 images") and len(errors) == 3
    header, *rows = csv.reader(io.StringIO(result.stdout))
    assert header == ["file", "rank", "class", "index", "probability"]
    assert [row[1] for row in rows] == ["1", "2"] * 3 and all(0 <= float(row[4]) <= 1 for row in rows)
    assert [os.path.basename(row[0])[:4] for row in rows[::2]] == ["a, b", "001_", "002_"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png", "--top=0"], "--top=0: must be at least 1"),
        (["x.png", "--json", "--csv"], "not allowed with"),
        ([], "required: IMAGE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments, message):
    result = predict("/nowhere", *arguments)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and message in result.stderr


@pytest.mark.medium
def test_a_closed_standard_output_is_one_line(workdir, pictures):
    command = commands.command("predict.py", f"--workdir={workdir}", pictures)
    line = f"{' '.join(map(shlex.quote, command))} >&-"
    done = subprocess.run(
        line, shell=True, cwd=commands.ROOT, env=commands.environment(), stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (
        1, "error: standard output is closed: the labels have nowhere to go\n",
    )  # fmt: skip


def test_outputs_that_are_not_finite_are_no_prediction(capsys):
    import predict as command

    rows = [("a.png", np.full(3, np.nan)), ("b.png", np.array([0.2, 0.7, 0.1]))]
    predictor = SimpleNamespace(stream=lambda files: iter(rows))
    assert command.label(predictor, [], 2, lambda file, row: f"{file} {row.argmax()}") == (2, 1)
    said = capsys.readouterr()
    assert "b.png 1" in said.out and "a.png: the network's outputs are not finite" in said.err
