import json
import math

import pytest

from hga_flax.errors import UserError
from hga_flax.pictures.curves import PaperValue, paper_values, read_curves, read_run
from hga_flax.runs.workdir import write_config, write_dataset
from tests.bench.test_dry_run import INFO
from tests.training import tiny


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "metrics.jsonl"


def test_a_run_that_went_back_replaces_what_it_made_again(tmp_path):
    file = write(
        tmp_path,
        *({"step": step, "train/loss": loss} for step, loss in ((2, 9.0), (4, 8.0), (6, 7.0))),
        {"step": 6, "eval/loss": 5.0},
        *({"step": step, "train/loss": loss} for step, loss in ((4, 3.0), (6, 2.0), (8, None))),
    )
    curves, damaged = read_curves(file)
    assert curves["eval/loss"] == ([6], [5.0]) and damaged == 0
    assert curves["train/loss"].steps == [2, 4, 6, 8]
    assert curves["train/loss"].values[:3] == [9.0, 3.0, 2.0] and math.isnan(curves["train/loss"].values[3])


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    file = write(tmp_path, {"step": 2, "train/loss": 1.0})
    bad = [b'{"step": 3, "train/lo', b"\xff\xfe", b"[1]", b'{"train/loss": 1}', b'{"step": "3", "train/loss": 1}',
           b'{"step": 3, "train/loss": "high"}', b"[" * 10_000, b"", b'{"step": 3, "loss": 1}']  # fmt: skip
    file.write_bytes(file.read_bytes() + b"\n".join([*bad, b'{"step": 4, "train/loss": 0.5}\n']))
    assert read_curves(file) == ({"train/loss": ([2, 4], [1.0, 0.5])}, 8)


def test_no_curves_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        read_curves(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no metrics"):
        read_curves(tmp_path / "metrics.jsonl")


def test_epochs_follow_from_the_data_and_the_batch(tmp_path):
    write(tmp_path, {"step": 6, "eval/loss": 1.0})
    with pytest.raises(UserError, match="its epochs are not known, try --x=step"):
        read_run(str(tmp_path), None, epochs=True)
    assert read_run(str(tmp_path), None, epochs=False).label == tmp_path.name
    write_config(tmp_path, tiny.config())  # 48 examples in batches of 16
    write_dataset(tmp_path, INFO)
    run = read_run(str(tmp_path), None, epochs=True)
    assert run.curve("eval/loss") == ([2.0], [1.0]) and run.curve("eval/absent") == ([], [])
    assert run.label == f"{tmp_path.name} (cifar_resnet8, hga)" and run.paper == {}


@pytest.mark.parametrize(
    ("data", "model", "attention", "options", "attention_options", "expected"),
    [
        ("imagenet2012", "resnet50", "hga", "", "", ("Table 2", 22.48, 6.22)),
        ("imagenet2012", "resnet50", "hga", "zero_init_residual=True", "form='conv'", ("Table 2", 22.48, 6.22)),
        ("imagenet2012", "resnet50", "none", "", "", ("Table 2", 24.80, 7.48)),
        ("imagenet2012", "resnet101", "se", "", "", ("Table 3", 22.38, None)),
        ("imagenet2012", "resnet101", "hga", "", "kernels=(7,)", ("Table 6", 21.67, 5.66)),
        ("imagenet2012", "resnet101", "hga", "", "hap=False", ("Table 5", 21.58, 5.63)),
        ("cifar100", "cifar_preact_resnet110", "hga", "", "", ("Table 4", 22.02, None)),
        ("cifar10", "cifar_preact_resnet110", "eca", "", "", None),
        ("cifar10", "cifar_preact_resnet110", "hga", "features=8", "", None),
        ("cifar10", "cifar_preact_resnet110", "hga", "", "reduction=2", None),
        ("cifar10", "cifar_preact_resnet110", "mine", "", "", None),
        ("digits", "cifar_preact_resnet110", "hga", "", "", None),
    ],
)
def test_the_papers_value_is_that_of_the_same_network(data, model, attention, options, attention_options, expected):
    config = tiny.config(
        data__name=data, data__fake=False, model__name=model, model__options=options, model__attention=attention,
        model__attention_options=attention_options,
    )  # fmt: skip
    found = {} if expected is None else {
        name: PaperValue(expected[0], value)
        for name, value in zip(("top1_error", "top5_error"), expected[1:], strict=True)
        if value is not None
    }  # fmt: skip
    assert paper_values(config) == found
    with config.unlocked():
        config.data.fake = True
    assert paper_values(config) == {}
