"""One kind of error for everything a user can mend, and the wrapper that prints it."""

import argparse
import contextlib
import difflib
import logging
import os
import pathlib
import select
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

BROKEN_PIPE = 141  # the exit code where a reader went away: 128 + SIGPIPE
_aliases: dict[str, str] = {}


def alias(folder: pathlib.Path, address: str) -> None:
    """Has every message call a folder of this machine by the address that it is the copy of."""
    _aliases[str(folder)] = address


def called(text: object) -> str:
    """Returns a text with the folders in it called as the user calls them."""
    text = str(text)
    for folder in sorted(_aliases, key=len, reverse=True):
        text = text.replace(folder, _aliases[folder])
    return text


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do.

    A line break in it, as from a value that the user gave, becomes a space.
    """

    def __init__(self, message: object = ""):
        super().__init__(called(one_line(message)))


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key."""


class Interrupted(Exception):
    """A signal ended the command in good order: the message is one line, `code` the exit code.

    `alone` says that of several processes this one stops by itself, while the others may still wait for it.
    """

    def __init__(self, message: str, code: int, *, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line and exit code 1 for a bad command line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def one_line(message: object) -> str:
    """Joins the lines of a message, so that an error stays one line on the terminal."""
    return " ".join(str(message).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the known name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def expand(path: str, key: str) -> pathlib.Path:
    """Returns a path with its "~" resolved.

    Raises:
        UserError: "~" stands for a home folder that is not known, or the path is an address; the message names `key`.
    """
    if "://" in path:
        raise UserError(
            f"{key}={path}: an address is not read or written here, only files of this machine (gs:// and s3:// serve "
            "for the folder of a run and for data.dir)"
        )
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key}={path}: the home folder is not known; name the folder without ~") from None


def check_writable(path: pathlib.Path, key: str, remedy: str) -> None:
    """Checks, without creating anything, that a folder can be created or written to.

    Raises:
        UserError: it cannot; the message names `key` and ends with `remedy`.
    """
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise UserError(f"{key}={path} cannot be written to: {error.strerror}; {remedy}") from None
    if not there.is_dir():
        raise UserError(f"{key}={path} cannot be written to: {there} is not a folder; {remedy}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}={path} cannot be written to: {there} is read-only here; {remedy}")


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits: 0, 1 for a `UserError` (one line), 130 for Ctrl-C, 143 for SIGTERM,
    129 for SIGHUP.

    A reader of standard output that goes away, as `head` does, ends the command without a word, with 141 as it ends
    other programs. Any other exception is a bug of ours and keeps its traceback.
    """
    for name in ("asyncio", "gcsfs", "s3fs"):  # which print the traceback of what is raised, or of each try
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        code = _run(main)
    except BaseException:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or BROKEN_PIPE
    drop_unread_output()  # Python writes what is left at its exit, and would say what went wrong there
    if _is_one_of_several():
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


def _is_one_of_several() -> bool:
    """Returns whether JAX, at the interpreter's exit, would wait for the other processes of a run.

    After a run that ended well they have taken their leave of each other already (processes/distributed.py). Where
    this one ends early they are still at work, and would not come.
    """
    distributed = sys.modules.get("jax.distributed")
    return distributed is not None and distributed.is_initialized()


def leave(code: int, text: str) -> None:
    """Prints a line and ends the process, from any thread and whatever the main thread is waiting for."""
    with contextlib.suppress(OSError):  # a closed pipe, a full disk
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def _run(main: Callable[[], int | None]) -> int | str | None:
    try:
        return main() or 0
    except UserError as error:
        return _said(f"error: {one_line(error)}", 1)
    except Interrupted as stopped:
        return _said(one_line(stopped), stopped.code)
    except KeyboardInterrupt:
        return _said("interrupted; the same command goes on from the last checkpoint", 130)
    except SystemExit as stopped:  # argparse, after --help
        return stopped.code
    except BrokenPipeError:
        if not drop_unread_output():  # another pipe or connection
            raise
        return BROKEN_PIPE
    except (RuntimeError, AssertionError) as error:
        if line := _platform_error(error):
            return _said(f"error: {line}", 1)
        raise


def _said(line: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)
    return code


def drop_unread_output() -> bool:
    """Sends standard output and error, where nobody reads them any more, to nowhere; returns whether one was such."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLERR)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                gone = True
        except (OSError, ValueError, AttributeError):  # no file, closed, or a system without poll
            continue
    return gone


def _platform_error(error: Exception) -> str | None:
    """Returns a line for an error of JAX that comes from the devices that it was told to use, None for another."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked or "jax" not in sys.modules:
        return None
    try:
        sys.modules["jax"].devices()  # which JAX says anew as often as it is asked
    except Exception as reason:  # also an AssertionError without a word, where the plugin for GPUs is not installed
        said = one_line(reason).partition(" (set JAX_PLATFORMS")[0] or "JAX finds no such device"
        return (
            f"JAX_PLATFORMS={asked}: {said[:300]}; unset it or set it to cpu; GPUs and TPUs need a JAX that is "
            "installed for them (docs/scaling.md)"
        )
    return None
