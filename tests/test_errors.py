import os
import subprocess
import sys

import pytest

from hga_flax.errors import ArgumentParser, Interrupted, UserError, check_writable, expand, nearest, one_line, run_main


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

    def stopped():
        raise Interrupted("stopped by SIGTERM", 143)

    assert exit_code(stopped) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    with pytest.raises(ZeroDivisionError):  # a traceback: it is ours to mend
        run_main(lambda: 1 // 0)


def test_nearest():
    assert nearest("optimzer", ["optimizer", "schedule"]) == "; did you mean 'optimizer'?"
    assert nearest("xyz", ["optimizer"]) == ""
    assert one_line("a\n b") == "a b"


def test_a_folder_is_checked_without_being_made(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b", "key", "remedy")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=f"^key={tmp_path}/file/x cannot be written to: .*/file is not a folder; remedy$"
    ):
        check_writable(tmp_path / "file" / "x", "key", "remedy")
    with pytest.raises(UserError, match=r"^key=.* cannot be written to: File name too long; remedy$"):
        check_writable(tmp_path / ("n" * 300), "key", "remedy")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        UserError, match=f"^key={tmp_path}/a cannot be written to: {tmp_path} is read-only here; remedy$"
    ):
        check_writable(tmp_path / "a", "key", "remedy")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert str(expand("~/x", "key")).endswith("/x") and "~" not in str(expand("~/x", "key"))
    with pytest.raises(UserError, match=r"^key=~nobody_here: the home folder is not known"):
        expand("~nobody_here", "key")


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "az://bucket/run"])
def test_an_address_is_no_folder(path):
    with pytest.raises(UserError, match=f"^--out={path}: an address is not read or written here, only files of this"):
        expand(path, "--out")


def test_a_bad_command_line_is_a_user_error():
    with pytest.raises(UserError, match=r"unrecognized arguments: --x; see .* --help"):
        ArgumentParser().parse_args(["--x"])


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_answers_without_loading_jax(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--workdir" in result.stdout
    assert " jax\n" not in result.stderr
