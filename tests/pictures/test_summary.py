import json

import pytest

from hga_flax.__main__ import main
from hga_flax.config.loading import build_model
from hga_flax.counting.complexity import complexity
from hga_flax.errors import UserError
from hga_flax.runs.workdir import write_config, write_dataset
from tests.bench.test_dry_run import INFO
from tests.training import tiny


@pytest.fixture
def workdir(tmp_path):
    write_config(tmp_path, tiny.config())
    write_dataset(tmp_path, INFO)
    return str(tmp_path)


def test_a_workdirs_network_without_a_checkpoint(workdir, capsys):
    main(["summary", f"--workdir={workdir}", "--format=json"])
    parts = json.loads(capsys.readouterr().out)
    counted = complexity(build_model(tiny.config(), 10), (8, 8, 1))
    assert sum(part["parameters"] for part in parts) == counted.params
    assert sum(part["macs"] for part in parts) == counted.conv_fc_macs


def test_a_configuration_on_the_terminal_and_as_markdown(workdir, capsys):
    main(["summary", "--config=configs/digits.py", "--config.model.name=cifar_resnet8", "--blocks"])
    out = capsys.readouterr().out
    assert "cifar_resnet8, attention hga, images 24x24x1, 10 classes" in out and "stage3_block1" in out
    main(["summary", f"--workdir={workdir}", "--format=markdown"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5 + 1 and {line.count("|") for line in table} == {9}
    assert table[1].startswith("| --- | ---:") and table[-1].startswith("| total | 10 |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=/nowhere"], "no run here"),
        ([], "exactly one of --workdir, --config and --weights is required"),
        (["--config=configs/absent.py"], "no such file"),
        (
            ["--config=configs/digits.py", "--model=cifar_resnet8"],
            "^--model=cifar_resnet8: only for --weights=FILE; with --config write --config[.]model[.]name=",
        ),
        (["--config=configs/digits.py", "--attention=se"], "write --config[.]model[.]attention="),
        (["--config=configs/digits.py", "--weights=raw"], "^--weights=raw: only for"),
        (
            ["--config=configs/digits.py", "--config.model.attention_options=kernels=(2,)"],
            r"^config\.model cannot be built: kernel.* odd",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["summary", *arguments])


def test_a_workdir_takes_no_overrides(workdir):
    with pytest.raises(UserError, match=r"--config\.model\.name=resnet50: only for --weights=FILE; the run in"):
        main(["summary", f"--workdir={workdir}", "--config.model.name=resnet50"])
    with pytest.raises(UserError, match=r"^--attention: only for --weights=FILE"):
        main(["summary", f"--workdir={workdir}", "--attention=se"])
