"""The examples run as their docstrings say, and print what those promise."""

import re

import pytest

from tests.commands import ROOT, run

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short_and_headed_by_its_command(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 80
    head = text.split('"""')[1]
    assert f"python -m examples.{file.stem}" in head or f"python examples/{file.name}" in head


@pytest.mark.slow
def test_hga_in_your_cnn_learns():
    result = run("-m", "examples.hga_in_your_cnn", "--steps=60")
    assert result.returncode == 0, result.stderr
    assert numbers(r"loss (\S+)", result.stdout)[-1] < 1.5  # chance: 2.3
    (error,) = numbers(r"error on 297 digits: (\S+) %", result.stdout)
    assert error < 50  # chance: 90
    gates = re.findall(r"gates of (\w+): mean (\S+), from (\S+) to (\S+)", result.stdout)
    assert [name for name, *_ in gates] == ["hga1", "hga2"]
    assert all(0 <= float(low) < float(mean) < float(high) <= 1 for _, mean, low, high in gates)


@pytest.mark.slow
def test_compare_attentions_prints_a_row_for_each():
    flags = ("--attentions=none,eca", "--steps=2", "--seeds=1")
    result = run("-m", "examples.compare_attentions", *flags)
    assert result.returncode == 0, result.stderr
    assert "1,500 images to train on, 297 to test on" in result.stdout
    (none, none_error), (eca, eca_error) = re.findall(r"^(?:none|eca) +([\d,]+) +(\S+) ", result.stdout, re.MULTILINE)
    assert int(eca.replace(",", "")) == int(none.replace(",", "")) + 3 * 3  # three blocks, three taps each
    assert 0 <= float(none_error) <= 100 and 0 <= float(eca_error) <= 100


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "examples.read_checkpoint", "nope"], "no run here"),
        (["-m", "examples.read_checkpoint", "nope", "--images=0"], "--images=0: must be at least 1"),
        (
            ["-m", "examples.compare_attentions", "--attentions=none,hgaa"],
            "'hgaa'; did you mean 'hga'?",
        ),
        (["-m", "examples.compare_attentions", "--data=folder", "--dir=nope"], "data.dir=nope: no such folder"),
        (["-m", "examples.compare_attentions", "--seeds=0"], "--size, --steps and --seeds must be at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


@pytest.mark.medium
def test_read_checkpoint_says_what_evaluation_says(tmp_path):
    from hga_flax.training.restore import evaluate_workdir
    from hga_flax.training.trainer import train
    from tests.training import tiny

    train(tiny.config(data__fake_examples=16), str(tmp_path))
    result = run("-m", "examples.read_checkpoint", tmp_path, "--images=16")
    assert result.returncode == 0, result.stderr
    assert "step 6 of cifar_resnet8, attention hga" in result.stdout
    given = re.findall(r"a (\d) is classified as a (\d) \((\S+) %\)", result.stdout)
    assert len(given) == 16  # the whole split
    wrong = sum(label != taken for label, taken, _ in given)
    assert 100 * wrong / 16 == pytest.approx(evaluate_workdir(str(tmp_path), "latest")["top1_error"])
    assert len(re.findall(r"gates of stage\d_block1: mean 0\.\d+", result.stdout)) == 3
