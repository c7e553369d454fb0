"""The exception for all errors that a user can fix, and the wrapper that prints it."""

import argparse
import codecs
import contextlib
import difflib
import errno
import gc
import io
import logging
import os
import pathlib
import re
import select
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # errors of a full or failing disk
# Errors of reading that say nothing about the file; by name, because some systems lack some of them.
PASSING = {"ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EHOSTDOWN"}
PASSING |= {"EHOSTUNREACH", "ECONNRESET", "ECONNREFUSED", "ENETDOWN", "ENETUNREACH", "EREMOTEIO"}
# What XLA says under RESOURCE_EXHAUSTED. It says other things there when files, threads or the small memories inside a
# GPU or TPU run out, which is not the user's doing.
TOO_LITTLE_MEMORY = re.compile(r"out of memory(?! in memory space vmem)|failed to allocate", re.IGNORECASE)
NO_THREAD = "can't start new thread"  # Python's error
BROKEN_PIPE = 141  # exit code after a broken pipe: 128 + SIGPIPE
NOT_AWAITED = "not_awaited"  # begins the names of threads that a command does not wait for when it ends
PRINTABLE = "hga_flax.printable"  # name of `_printable` among Python's handlers of errors
_aliases: dict[str, str] = {}


def alias(folder: pathlib.Path, address: str) -> None:
    """Makes messages show `address` instead of `folder`, its local copy."""
    _aliases[str(folder)] = address


def called(text: object) -> str:
    """Replaces local folders in a text with the addresses that the user gave (see `alias`)."""
    text = str(text)
    for folder in sorted(_aliases, key=len, reverse=True):
        text = text.replace(folder, _aliases[folder])
    return text


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do.

    Line breaks in the message, for example from a value that the user gave, become spaces.
    """

    def __init__(self, message: object = ""):
        super().__init__(called(one_line(message)))


class ConfigError(UserError):
    """An invalid configuration; the message names the key."""


class TemporaryError(UserError):
    """Something outside the command is in its way and may pass, such as another command or a server that is away."""


def is_passing(error: OSError) -> bool:
    """Returns whether an error of reading says nothing about the file, as when a file server is away for a moment."""
    return errno.errorcode.get(error.errno or 0) in PASSING


def may_pass(error: BaseException) -> bool:
    """Returns whether the same command may succeed later: after a `TemporaryError`, a full disk, or a failed server."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TemporaryError):
            return True
        if isinstance(cause, OSError) and (cause.errno in FULL or is_passing(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class Interrupted(BaseException):
    """A signal ended the command cleanly; the message is one line.

    It is raised wherever the main thread happens to be, so like KeyboardInterrupt it is no Exception, which code that
    reads files or talks to a bucket would catch as a failure.

    Attributes:
        code: exit code.
        alone: whether only this one of several processes stops, while the others may still be waiting for it.
    """

    def __init__(self, message: str, code: int, *, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that reports a bad command line in one line, with exit code 1, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does, but rejects a flag without a value, such as `--name=` from an unset variable."""
        args = list(sys.argv[1:] if args is None else args)
        for argument in args[: args.index("--") if "--" in args else None]:
            if argument.startswith("--") and argument.endswith("="):
                self.error(f"{argument} has no value")
        return super().parse_known_args(args, namespace)


def one_line(message: object) -> str:
    """Joins the lines of a message, so that an error is one line in the terminal."""
    return " ".join(str(message).split())


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the known name nearest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def expand(path: str, key: str) -> pathlib.Path:
    """Returns a path with "~" expanded.

    Raises:
        UserError: the home folder is unknown, or the path is too long, unreachable or an address; the message names
            `key`.
    """
    if "://" in path:
        raise UserError(
            f"{key}={path}: this address cannot be used here; give a path on this machine (gs:// and s3:// work only "
            "for the folder of a run and for data.dir)"
        )
    try:
        expanded = pathlib.Path(path).expanduser()
        os.lstat(expanded)
    except RuntimeError:
        raise UserError(f"{key}={path}: the home folder is unknown; write the path without ~") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EACCES):  # for which `expanded.exists()` would raise too
            raise UserError(f"{key}={path}: {error.strerror}; choose another path") from None
    return expanded


def check_writable(path: pathlib.Path, key: str, remedy: str) -> None:
    """Checks that a folder can be created or written to, without creating anything.

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
    """Runs a command's `main` and exits with its code.

    The code is 1 for a `UserError` (one line), 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP and 138 for SIGUSR1. If
    the reader of standard output closes the pipe, as `head` does, the command ends silently with 141, like other
    programs. Too little memory is one line too. Any other exception is our bug and keeps its traceback.
    """
    # Importing and tracing make millions of objects that stay. Looking through the new ones after every 700 or 2000,
    # Python's default, took a fifth of the time to import JAX and to trace a step.
    gc.set_threshold(20_000, 10, 10)
    for name in ("asyncio", "gcsfs", "s3fs"):  # these print tracebacks of exceptions, even of failed attempts
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _not_raised
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=PRINTABLE)
    try:
        code = _run(main)
    except BaseException:
        if not _must_not_wait():
            raise
        traceback.print_exc()
        code = 1
    try:
        if sys.stdout is not None:  # closed by the caller: >&-
            sys.stdout.flush()
    except BrokenPipeError:
        code = code or BROKEN_PIPE
    except OSError as error:
        code = code or _unwritable(error)
    drop_unread_output()  # Python flushes at exit and would report a broken pipe there
    if _must_not_wait():
        if processes := sys.modules.get("multiprocessing.util"):
            processes._run_finalizers(0)  # as when Python exits: gives semaphores and shared memory back
        os._exit(code)
    sys.exit(code)


def _printable(error: UnicodeError) -> tuple[bytes, int]:
    """Writes what the encoding of standard output lacks: bytes of a file's name as they are, characters as "\\u732b".

    Without it a name of a class would end a training whose output goes to a terminal that is not in UTF-8.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    named = lambda character: bytes([ord(character) - 0xDC00]) if "\udc80" <= character <= "\udcff" else None
    return b"".join(named(c) or c.encode("ascii", "backslashreplace") for c in part), error.end


codecs.register_error(PRINTABLE, _printable)


def _not_raised(what: "sys.UnraisableHookArgs") -> None:
    """Ends the command at a Ctrl-C that came while a destructor ran, or JAX's callback of the garbage collector.

    Python would print the KeyboardInterrupt as ignored, and the command would go on. Of other exceptions it prints the
    traceback, except where a thread of TensorStore finds that nobody waits for its array any more: when one array of a
    checkpoint cannot be written, Orbax reports that and leaves the others.
    """
    if isinstance(what.exc_value, KeyboardInterrupt):
        leave(130, "interrupted")
    if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(what)


def _must_not_wait() -> bool:
    """Returns whether the interpreter, when it exits, would wait for something that nobody needs.

    One is a thread called NOT_AWAITED. The other is JAX's wait for the other processes of a run: after a successful
    run they have already disconnected (processes/distributed.py), but if this one ends early, they are still working
    and would never join the shutdown.
    """
    distributed = sys.modules.get("jax.distributed")
    several = distributed is not None and distributed.is_initialized()
    return several or any(thread.name.startswith(NOT_AWAITED) for thread in threading.enumerate())


def leave(code: int, text: str) -> None:
    """Prints a line and ends the process; works from any thread, even if the main thread is blocked."""
    with contextlib.suppress(OSError):  # a closed pipe, a full disk
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def _run(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        return _said(f"error: {one_line(error)}", 1)
    except Interrupted as stopped:
        return _said(one_line(stopped), stopped.code)
    except KeyboardInterrupt:
        return _said("interrupted", 130)
    except SystemExit as stopped:  # argparse, after --help
        code = stopped.code or 0
        return code if isinstance(code, int) else _said(code, 1)
    except BrokenPipeError:
        if not drop_unread_output():  # another pipe or connection
            raise
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        return _unwritable(error)
    except ValueError as error:
        if line := _variable_error(error):
            return _said(f"error: {line}", 1)
        raise
    except (RuntimeError, AssertionError, MemoryError) as error:
        if line := _memory_error(error) or _platform_error(error):
            return _said(f"error: {line}", 1)
        raise


def _unwritable(error: OSError) -> int:
    """Reports that standard output cannot be written; redirects it to /dev/null, or Python would report it again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    return _said(f"error: standard output cannot be written: {error.strerror}", 1)


def _said(line: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)
    return code


def drop_unread_output() -> bool:
    """Redirects standard output and error to /dev/null if their reader is gone; returns whether any reader was gone."""
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
        except (OSError, ValueError, AttributeError):  # not a file, closed, or no poll on this system
            continue
    return gone


def _memory_error(error: Exception) -> str | None:
    """Returns a one-line message if the machine's or a device's memory is too small, otherwise None."""
    if NO_THREAD in str(error):
        return f"{one_line(error)}: the limits of this process are too low; raise them (ulimit -u, ulimit -v)"
    before, _, reason = one_line(error).partition("RESOURCE_EXHAUSTED: ")
    if isinstance(error, MemoryError):  # Python's and NumPy's
        reason = before
    elif not TOO_LITTLE_MEMORY.search(reason):
        return None
    reason = re.sub(r"\d{8,} bytes", lambda size: f"{float(size[0].split()[0]) / 1e9:,.1f} GB", reason)
    return (
        f"too little memory: {reason[:300].rstrip('. ') or 'Python does not say for what'}; use a smaller batch "
        "(training.batch_size, evaluation.batch_size, --batch-size) or smaller images (data.image_size), and on a "
        "CPU a smaller data.cache_mb; on a GPU or TPU training can split a batch (training.accumulation_steps), and "
        "train.py --dry-run=compile tells what a step needs"
    )


def _variable_error(error: ValueError) -> str | None:
    """Returns a one-line message if JAX refuses the value of an environment variable, otherwise None."""
    named = re.search(r"(?:environment|JAX flag) '?(jax_\w+)", str(error), re.IGNORECASE)
    if named is None or (value := os.environ.get(named[1].upper())) is None:
        return None
    return f"{named[1].upper()}={value}: JAX does not know this value of the environment variable; correct or unset it"


def _platform_error(error: Exception) -> str | None:
    """Returns a one-line message if a JAX error is due to JAX_PLATFORMS, otherwise None."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked or "jax" not in sys.modules:
        return None
    try:
        sys.modules["jax"].devices()  # JAX raises the same error on every call
    except Exception as reason:  # includes an empty AssertionError if the GPU plugin is not installed
        said = one_line(reason).partition(" (set JAX_PLATFORMS")[0] or "JAX finds no such device"
        return (
            f"JAX_PLATFORMS={asked}: {said[:300]}; unset it or set it to cpu; GPUs and TPUs need a JAX that supports "
            "them (docs/scaling.md)"
        )
    return None
