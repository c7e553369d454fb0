"""`python -m hga_flax` as a user calls it."""

import json
import os
import subprocess
import sys

import pytest

from hga_flax.__main__ import COMMANDS, main
from hga_flax.errors import UserError


def call(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "hga_flax", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **options,
    )


def test_help_names_every_command_and_imports_no_jax():
    done = call("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    script = "import sys, hga_flax.__main__; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.medium
def test_no_command_loads_matplotlib_to_start():
    modules = [module for module, _ in COMMANDS.values()]
    script = f"import sys, {', '.join(modules)}, hga_flax.training.trainer; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"hga_flax {name}" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train", "evaluate", "predict"])
def test_a_script_called_as_a_command_is_named(script):
    with pytest.raises(UserError, match=f"^{script} is a separate script: python {script}.py"):
        main([script, "--workdir=runs/absent"])


@pytest.mark.medium
def test_a_table_as_a_subprocess():
    done = call("paper", "equations", "--json")
    assert done.returncode == 0, done.stderr
    assert {row["equation"] for row in json.loads(done.stdout)} == {"8", "9", "10", "11", "12"}


def test_bad_input_ends_with_one_line(tmp_path):
    done = call("paper", "table2", "--results", str(tmp_path / "absent.json"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: cannot read results file") and done.stderr.count("\n") == 1


def test_an_unknown_command_or_table_is_refused_with_the_known_ones():
    for arguments, known in ((["papers"], "paper"), (["paper", "table7"], "table6"), ([], "COMMAND")):
        with pytest.raises(UserError, match=known):
            main(arguments)
