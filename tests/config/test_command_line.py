import subprocess
import sys

import pytest

from hga_flax.__main__ import main
from hga_flax.bench import soak, sweep
from hga_flax.config import command_line
from hga_flax.config.command_line import add_import_flag, import_flags, split_overrides
from hga_flax.config.loading import configure
from hga_flax.errors import ArgumentParser, UserError
from hga_flax.version import version_of_code
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


@pytest.mark.parametrize(
    "command",
    ["bench attention", "bench step", "networks", "compile --config=f.py", "soak --config=f.py", "summary", "explain",
     "export", "study f.py", "report f.py"],
)  # fmt: skip
def test_every_command_that_builds_a_network_takes_a_module_of_the_users(command):
    with pytest.raises(UserError, match="--import=no_such_module: ModuleNotFoundError"):
        main([*command.split(), "--import=no_such_module"])


def test_processes_that_a_command_starts_import_it_too(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "_imported", ["no_such_module"])
    process = soak._start(configure(str(ROOT / "configs/digits.py"), []), tmp_path / "run")
    assert "--import=no_such_module: ModuleNotFoundError" in process.communicate()[1] and process.returncode == 1
    with pytest.raises(UserError, match="--import=no_such_module"):
        sweep._compile_afresh(command_line.imported_modules(), "{}", "v5e:1x1", 1)


def test_an_edited_module_of_the_users_is_another_version(tmp_path, monkeypatch):
    def used():
        monkeypatch.setattr(command_line, "_code", {})
        for name in ("mine", "package"):
            sys.modules.pop(name, None)
            command_line.import_module(name)
        return command_line.code_in_use()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "_imported", [])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text("A = 1\n")
    (tmp_path / "package").mkdir()
    for name in ("__init__.py", "part.py"):
        (tmp_path / "package" / name).write_text("A = 1\n")
    first = used()
    assert used() == first and first.startswith(version_of_code() + ", mine (code ")
    (tmp_path / "mine.py").write_text("A = 2\n")
    second = used()
    (tmp_path / "package" / "part.py").write_text("A = 2\n")
    assert len({first, second, used()}) == 3


def test_other_commands_are_printed_with_what_was_imported(monkeypatch, tmp_path):
    monkeypatch.setattr("hga_flax.config.command_line._imported", [])
    assert import_flags() == []
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    add_import_flag(parser)
    parser.parse_args(["--import=json", "--import=csv"])
    assert import_flags() == ["--import=json", "--import=csv"]
