import io

from rich.console import Console as RichConsole

from hga_flax.training.console import Console, duration


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
