"""Console output of a run: lines, and on a terminal a live progress bar below them."""

from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from hga_flax.errors import called, drop_unread_output

PLAIN_WIDTH = 200


def duration(seconds: float) -> str:
    """Formats seconds as hours, minutes and seconds: "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Rich(RichConsole):
    goes_on = False

    def _check_buffer(self) -> None:  # Rich writes the output here
        try:
            super()._check_buffer()
        except OSError:  # for example a closed terminal or a full disk
            if not self.goes_on:
                raise
            self.quiet = True

    def on_broken_pipe(self) -> None:
        if not self.goes_on:
            raise BrokenPipeError  # ends the command, see errors.run_main
        drop_unread_output()
        self.quiet = True


class Console:
    """Prints lines and, between `__enter__` and `__exit__`, a live progress bar (on terminals only).

    Args:
        active: False prints nothing (for processes other than process 0).
        goes_on: if output can no longer be written (closed pipe as in `| head -1`, full disk), keep running
            silently; otherwise the command ends.
    """

    def __init__(self, *, active: bool = True, goes_on: bool = False):
        # Rich would replace ":fire:" in a path by a picture.
        self._rich = _Rich(quiet=not active, highlight=False, soft_wrap=True, emoji=False)
        self._rich.goes_on = goes_on
        if not self._rich.is_terminal:
            self._rich.width = max(self._rich.width, PLAIN_WIDTH)  # do not wrap paths in a log file
        self._progress: Progress | None = None

    def line(self, text: str, style: str | None = None) -> None:
        """Prints one line, above the progress bar if there is one."""
        self._rich.print(called(text), style=style, markup=False)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Prints names and values in two columns."""
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        self._show(table)

    def columns(self, title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """Prints rows below a header; columns of numbers are right-aligned."""
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, name in enumerate(header):
            numbers = all(row[i].rstrip("%").replace(",", "").replace(".", "").isdecimal() for row in rows)
            table.add_column(name, style="cyan" if i == 0 else None, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*row)
        self._show(table)

    def _show(self, table: Table) -> None:
        if self._rich.is_terminal:
            self._rich.print(table, markup=False)
            return
        with self._rich.capture() as captured:  # strip the trailing blanks of table lines in files and pipes
            self._rich.print(table, markup=False)
        for text in captured.get().splitlines():
            self.line(text.rstrip())

    def start_progress(self, done: int, total: int) -> "Console":
        """Prepares a bar with `done` of `total` steps done; use the result as a context manager."""
        if self._rich.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(24), TaskProgressColumn())
            self._progress = Progress(*columns, TextColumn("{task.description}"), console=self._rich, transient=True)
            self._task = self._progress.add_task("compiling ...", total=total, completed=done)
        return self

    def update(self, step: int, text: str) -> None:
        """Moves the bar to `step` and replaces the text after it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)

    def __enter__(self) -> "Console":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
