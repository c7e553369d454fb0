import json
import os
import subprocess
import sys

import pytest

from hga_flax.processes import huge_pages
from tests import commands

# Touches 256 MB of memory and prints what became of it and of the process.
SCRIPT = """
import json, os, sys
from hga_flax.processes.huge_pages import use_huge_pages

if __name__ == "__main__":
    before = os.environ.get("GLIBC_TUNABLES")
    use_huge_pages()
    memory = bytearray(2**28)
    memory[::4096] = b"x" * 2**16
    huge = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
    print(json.dumps({"pid": os.getpid(), "arguments": sys.argv, "flags": [sys.flags.utf8_mode, sys.flags.optimize],
                      "tunables": before, "huge_kb": int(huge.split()[1])}))
"""
MODE = huge_pages.MODES.read_text() if huge_pages.MODES.exists() else ""
waits = pytest.mark.skipif("[madvise]" not in MODE or not huge_pages._glibc_can_ask(), reason="nothing to ask for")


def start(arguments, tunables, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    variables = commands.environment() | {"GLIBC_TUNABLES": tunables, "PYTHONPATH": str(commands.ROOT)}
    process = subprocess.Popen(
        [sys.executable, *arguments], env=variables, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    output = json.loads(process.communicate(timeout=60)[0].splitlines()[-1])
    assert process.returncode == 0
    return output, process.pid


@waits
@pytest.mark.parametrize(
    "given", [["script.py"], ["-m", "script"], ["-X", "utf8", "script.py"], ["-O", "-m", "script"]]
)
def test_a_command_starts_again_with_huge_pages(given, tmp_path):
    output, pid = start([*given, "one", "two words", "--three=-m"], "", tmp_path)
    assert output["tunables"] == "glibc.malloc.hugetlb=1" and output["huge_kb"] > 2**17
    assert output["pid"] == pid and output["arguments"][1:] == ["one", "two words", "--three=-m"]
    assert output["flags"] == [int("-X" in given), int("-O" in given)]


@waits
def test_other_tunables_are_kept_and_a_choice_is_respected(tmp_path):
    output, _ = start(["script.py"], "glibc.malloc.arena_max=2", tmp_path)
    assert output["tunables"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1" and output["huge_kb"] > 2**17
    output, _ = start(["script.py"], "glibc.malloc.hugetlb=0", tmp_path)
    assert output["tunables"] == "glibc.malloc.hugetlb=0" and output["huge_kb"] < 2**17


@waits
@pytest.mark.parametrize(
    "runner",
    [
        ["-m", "cProfile", "-o", "profile", "script.py"],
        ["-c", "import runpy; runpy.run_path('script.py', run_name='__main__')"],
        ["other.py"],
    ],
)
def test_a_profiler_or_another_program_is_not_started_again(runner, tmp_path):
    (tmp_path / "other.py").write_text(
        "import runpy, sys; sys.argv = ['script.py']; runpy.run_path('script.py', run_name='__main__')"
    )
    output, _ = start(runner, "", tmp_path)
    assert not output["tunables"] and output["huge_kb"] < 2**17


@pytest.mark.parametrize(
    ("mode", "library", "restarted"),
    [
        ("always [madvise] never", "glibc 2.36", True),
        ("always [madvise] never", "glibc 2.35", True),
        ("always [madvise] never", "glibc 2.34", False),
        ("always [madvise] never", None, False),
        ("always [madvise] never", AttributeError, False),
        ("[always] madvise never", "glibc 2.36", False),
        ("always madvise [never]", "glibc 2.36", False),
        (None, "glibc 2.36", False),
    ],
)
def test_a_command_starts_again_only_where_huge_pages_must_be_asked_for(
    mode, library, restarted, monkeypatch, tmp_path
):
    def confstr(name):
        assert name == "CS_GNU_LIBC_VERSION"
        if library is AttributeError:
            raise AttributeError
        return library

    started = []
    monkeypatch.setattr(huge_pages, "MODES", tmp_path / "mode")
    monkeypatch.setattr(huge_pages.os, "confstr", confstr)
    monkeypatch.setattr(huge_pages.os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py", "a"])
    monkeypatch.setattr(sys, "argv", ["train.py", "a"])
    if mode:
        (tmp_path / "mode").write_text(mode)
    huge_pages.use_huge_pages()
    assert started == ([(sys.executable, [sys.executable, "-u", "train.py", "a"])] if restarted else [])
    assert os.environ["GLIBC_TUNABLES"] == ("glibc.malloc.hugetlb=1" if restarted else "")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py", "hga_flax/__main__.py"])
def test_the_commands_ask_first(script):
    main = (commands.ROOT / script).read_text().split('if __name__ == "__main__":\n')[1]
    assert main == "    use_huge_pages()\n    run_main(main)\n"
