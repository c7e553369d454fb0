"""One kind of error for everything a user can mend, and the wrapper that prints it."""

import argparse
import difflib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

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

    `alone` says that of several processes this one stops by itself, and the others must learn of it.
    """

    def __init__(self, message: str, code: int, alone: bool = False):
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

    Any other exception is a bug of ours and keeps its traceback.
    """
    for name in ("asyncio", "gcsfs", "s3fs"):  # which print the traceback of what is raised, or of each try
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stopped:
        print(one_line(stopped), file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
