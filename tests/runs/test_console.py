import io
import os
import subprocess
import sys

import pytest
from rich.console import Console as RichConsole

from hga_flax.runs.console import Console, duration


def test_duration():
    assert (duration(5), duration(125.4), duration(3723)) == ("0:05", "2:05", "1:02:03")


def test_lines_and_tables_are_plain_text_where_there_is_no_terminal(capsys):
    console = Console()
    console.line("loss [1] 0.5", "bold")
    with console.start_progress(0, 10):
        console.update(3, "never shown")
    console.table("title", [("name", "a value"), ("other", "[x]")])
    assert capsys.readouterr().out.splitlines() == [
        "loss [1] 0.5",
        "title",
        "name   a value",
        "other  [x]",
    ]


def test_columns_have_numbers_at_the_right(capsys):
    Console().columns("title", ("name", "count"), [("[a]", "1,000"), ("b", "2.5")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["title", "name  count", "[a]   1,000", "b       2.5"]
    Console(active=False).columns("title", ("name",), [("a",)])
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_live_bar():
    console, screen = Console(), io.StringIO()
    console._rich = RichConsole(file=screen, force_terminal=True, width=80)
    with console.start_progress(2, 10):
        console.update(5, "loss 0.1")
    assert "step 5/10" in screen.getvalue() and "loss 0.1" in screen.getvalue()


def test_other_processes_print_nothing(capsys):
    console = Console(active=False)
    console.line("x")
    console.table("t", [("a", "b")])
    assert capsys.readouterr().out == ""


GOES_ON = """
import sys
from hga_flax.errors import run_main
from hga_flax.runs.console import Console
def main():
    console = Console(goes_on=sys.argv[1] == "True")
    for i in range(200):
        console.line(f"line {i} " + 1000 * "x")
    console.table("title", [("a", "b")])
    print("to the end", file=open(sys.argv[2], "w"))
run_main(main)
"""


@pytest.mark.parametrize(("goes_on", "code"), [(True, 0), (False, 141)])
def test_training_goes_on_when_nobody_reads_any_more(tmp_path, goes_on, code):
    end = tmp_path / "end"
    command = [sys.executable, "-c", GOES_ON, str(goes_on), str(end)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == code and end.exists() == goes_on


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_training_goes_on_when_its_lines_cannot_be_written(tmp_path):
    end = tmp_path / "end"
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", GOES_ON, "True", str(end)], stdout=full, check=False)
    assert end.exists()


def test_colons_in_a_path_are_no_picture(capsys):
    Console().line("--workdir=runs/lr:100:x:fire:b")
    Console().table("title", [("name", "runs/a:fire:b")])
    assert capsys.readouterr().out.splitlines() == ["--workdir=runs/lr:100:x:fire:b", "title", "name  runs/a:fire:b"]
