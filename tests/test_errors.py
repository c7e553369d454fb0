import subprocess
import sys

import pytest

from hga_flax.errors import ArgumentParser, UserError, nearest, one_line, run_main


def exit_code(main):
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    return caught.value.code


def test_a_user_error_is_one_line_and_exit_code_1(capsys):
    def main():
        raise UserError("first\n  second")

    assert exit_code(main) == 1
    assert capsys.readouterr().err == "error: first second\n"


def test_success_interruption_and_our_own_bugs(capsys):
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 1) == 1

    def interrupted():
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a traceback: it is ours to mend
        run_main(lambda: 1 // 0)


def test_nearest():
    assert nearest("optimzer", ["optimizer", "schedule"]) == "; did you mean 'optimizer'?"
    assert nearest("xyz", ["optimizer"]) == ""
    assert one_line("a\n b") == "a b"


def test_a_bad_command_line_is_a_user_error():
    with pytest.raises(UserError, match=r"unrecognized arguments: --x; see .* --help"):
        ArgumentParser().parse_args(["--x"])


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_answers_without_loading_jax(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--workdir" in result.stdout
    assert " jax\n" not in result.stderr
