"""Pages of 2 MB for a command's large arrays, which CPUs train on up to a third faster than on pages of 4 kB."""

import contextlib
import itertools
import os
import pathlib
import sys

TUNABLE = "glibc.malloc.hugetlb"
VARIABLE = "GLIBC_TUNABLES"
MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")  # the active mode is in brackets


def use_huge_pages() -> None:
    """Starts this process's command again with huge pages, if they have to be asked for; call it first.

    XLA allocates the memory of a step afresh in every step, a few gigabytes, and Linux gives it out in pages. In its
    mode "madvise", which is Ubuntu's default, pages are large only where a program asks for it. glibc asks if
    GLIBC_TUNABLES says so when a process starts, so the process replaces itself: same number, same arguments.

    Nothing happens in Linux's other modes, with a C library that cannot ask (before glibc 2.35, musl, macOS), if
    GLIBC_TUNABLES already says something about huge pages, or if this is not the process's own command but a
    debugger's, a profiler's or a notebook's. Sources: glibc's manual (Memory Allocation Tunables); Linux's
    Documentation/admin-guide/mm/transhuge.rst.

    Example:
        if __name__ == "__main__":
            use_huge_pages()
            run_main(main)
    """
    tunables = os.environ.get(VARIABLE, "")
    if TUNABLE in tunables or not (_linux_waits() and _glibc_can_ask() and _own_command()):
        return
    os.environ[VARIABLE] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    with contextlib.suppress(OSError):  # huge pages are not worth an error
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _linux_waits() -> bool:
    with contextlib.suppress(OSError):
        return "[madvise]" in MODES.read_text()
    return False


def _glibc_can_ask() -> bool:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    return False


def _own_command() -> bool:
    """Returns whether the interpreter was given this script or module and, before it, nothing but options."""
    given = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]  # up to the name of the script or module
    if given[-2:-1] == ["-m"]:
        options = given[:-2]
    elif given[-1:] == sys.argv[:1]:
        options = given[:-1]
    else:
        return False
    pairs = itertools.pairwise(["", *options])
    return bool(sys.executable) and all(option.startswith("-") or before in ("-X", "-W") for before, option in pairs)
