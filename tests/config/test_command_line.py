import subprocess
import sys

import pytest

from hga_flax.config.command_line import add_import_flag, import_flags, split_overrides
from hga_flax.errors import ArgumentParser
from tests.commands import ROOT


def test_a_commands_own_arguments_and_the_configurations():
    arguments = ["input", "--config=f.py", "--config.seed=1", "--json", "--config.model.name", "resnet50", "--x", "y"]
    own, overrides = split_overrides(arguments)
    assert own == ["input", "--config=f.py", "--json", "--x", "y"]
    assert overrides == ["--config.seed=1", "--config.model.name=resnet50"]


def test_a_key_without_a_value_is_left_for_the_configuration_to_refuse():
    assert split_overrides(["--config.seed", "--json"]) == (["--json"], ["--config.seed"])


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_module_of_the_users_is_imported_first(script, tmp_path, monkeypatch):
    (tmp_path / "my_attention.py").write_text("raise ValueError('as expected\\nhere')")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(ROOT / script), "--workdir=x", "--import=my_attention"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: --import=my_attention: ValueError: as expected here\n")


def test_other_commands_are_printed_with_what_was_imported(monkeypatch, tmp_path):
    monkeypatch.setattr("hga_flax.config.command_line._imported", [])
    assert import_flags() == []
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    add_import_flag(parser)
    parser.parse_args(["--import=json", "--import=csv"])
    assert import_flags() == ["--import=json", "--import=csv"]
