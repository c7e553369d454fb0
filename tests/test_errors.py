import os
import shlex
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax import errors
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
    assert exit_code(sys.exit) == 0
    assert exit_code(lambda: sys.exit("a line")) == 1
    assert capsys.readouterr().err == "a line\n"

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


def test_one_of_several_processes_that_fails_ends_before_jax_waits_for_the_others(monkeypatch, capsys):
    codes, kinds = (
        [],
        {"user": UserError("no"), "signal": Interrupted("stopped", 143, alone=True), "bug": KeyError("k")},
    )
    monkeypatch.setitem(sys.modules, "jax.distributed", types.SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(errors.os, "_exit", codes.append)

    def fail(kind):
        raise kinds[kind]

    for kind in kinds:
        exit_code(lambda kind=kind: fail(kind))  # SystemExit, as `_exit` does not end this process
    printed = capsys.readouterr().err
    assert codes == [1, 143, 1]
    assert printed.startswith("error: no\nstopped\nTraceback") and printed.endswith("KeyError: 'k'\n")


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
    with pytest.raises(UserError, match=r"^key=~nobody_here: the home folder is unknown"):
        expand("~nobody_here", "key")


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "az://bucket/run"])
def test_an_address_is_no_folder(path):
    with pytest.raises(UserError, match=f"^--out={path}: this address cannot be used here; give a path on this"):
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


PRINTS = """
import sys, time
from hga_flax.errors import UserError, run_main
def main():
    for i in range(100):
        print(i, flush=True)
        time.sleep(0.01)
run_main(main)
"""


@pytest.mark.parametrize("script", [PRINTS, PRINTS.replace(", flush=True", "")])
def test_a_reader_that_goes_away_ends_a_command_without_a_word(script):
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_another_pipe_that_breaks_is_a_bug_as_any_other():
    def main():
        raise BrokenPipeError("a worker process")

    with pytest.raises(BrokenPipeError):
        run_main(main)


DEVICES = """
from hga_flax.errors import run_main
def main():
    import jax
    jax.numpy.zeros(3) + 1
run_main(main)
"""


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "cdua"])
def test_devices_that_are_not_there_are_one_line(platforms):
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"error: JAX_PLATFORMS={platforms}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", ["JAX_ENABLE_X64=maybe", "JAX_DEFAULT_PRNG_IMPL=dice", "JAX_NUM_CPU_DEVICES=two"])
def test_a_variable_that_jax_refuses_is_one_line(given):
    environment = os.environ | dict([given.split("=")])
    done = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"error: {given}: JAX does not know") and done.stderr.count("\n") == 1


def test_other_errors_keep_their_traceback_whatever_the_platform(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)

    def main():
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match=r"^ours$"):
        run_main(main)


def test_a_flag_without_a_value_is_refused():
    parser = ArgumentParser(prog="command")
    parser.add_argument("--name", default="x")
    parser.add_argument("rest", nargs="*")
    with pytest.raises(UserError, match=r"^--name= has no value; see command --help$"):
        parser.parse_args(["--name="])
    assert parser.parse_args(["--name", "y", "--", "--name="]).rest == ["--name="]


@pytest.mark.parametrize(
    ("ending", "last"),
    [("pass", []), ("raise UserError('no')", ["error: no"]), ("raise KeyError('bug')", ["KeyError: 'bug'"])],
)
def test_a_command_does_not_wait_for_a_compilation_that_nobody_needs_any_more(ending, last):
    code = f"""
import time
from concurrent.futures import ThreadPoolExecutor
from hga_flax.errors import NOT_AWAITED, UserError, run_main

def main():
    ThreadPoolExecutor(1, NOT_AWAITED).submit(time.sleep, 100)
    print("last words")
    {ending}

run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (ending != "pass", "last words\n")
    assert done.stderr.splitlines()[-1:] == last


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        ("KeyboardInterrupt", 130, ["interrupted"]),
        ("ValueError('x')", 0, ["went on", "ValueError: x"]),
        ("RuntimeError('Event loop is closed')", 0, ["went on"]),  # as of a checkpoint that cannot be written
    ],
)
def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(error, code, lines):
    """Where Python prints any exception as ignored."""
    program = f"""
import gc, sys
from hga_flax.errors import run_main

def main():
    def fail(phase, info):
        gc.callbacks.remove(fail)
        raise {error}

    gc.callbacks.append(fail)
    gc.collect()
    print("went on", file=sys.stderr)

run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == code and set(lines) <= set(done.stderr.splitlines())
    assert ("went on" in done.stderr) == (code == 0) and ("Traceback" in done.stderr) == (len(lines) > 1)


def test_a_command_that_does_not_wait_leaves_no_semaphores():
    """Python would name them after the command's last line."""
    code = """
import multiprocessing, time
from concurrent.futures import ThreadPoolExecutor
from hga_flax.errors import NOT_AWAITED, UserError, run_main

def main():
    main.event = multiprocessing.get_context("spawn").Event()
    ThreadPoolExecutor(1, NOT_AWAITED).submit(time.sleep, 100)
    raise UserError("no")

run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (1, "error: no\n")


def test_too_little_memory_is_one_line_that_says_what_to_make_smaller(capsys):
    for command, reason in (
        (lambda: jnp.zeros(1 << 60, jnp.uint8), "Out of memory allocating 1,152,921,504.6 GB"),  # by XLA
        (lambda: np.ones(1 << 57), "Unable to allocate 1.00 EiB for an array"),
    ):
        assert exit_code(command) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: too little memory: {reason}") and said.count("\n") == 1
        assert "training.batch_size" in said and "training.accumulation_steps" in said


@pytest.mark.parametrize(
    ("words", "ours"),  # XLA's
    [
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 34.36GiB (36893488147B) on device ordinal 0", False),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm.", False),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack", True),
        ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 300000, available: 232448", True),
        ("INTERNAL: out of memory", True),
    ],
)
def test_only_the_memory_that_the_user_can_save_is_one_line(words, ours, capsys):
    def fail():
        raise RuntimeError(words)

    if ours:
        with pytest.raises(RuntimeError):
            run_main(fail)
    else:
        assert exit_code(fail) == 1
        assert capsys.readouterr().err.startswith(f"error: too little memory: {words.partition(': ')[2][:30]}")


def test_a_limit_of_threads_is_one_line(capsys):
    def main():
        raise RuntimeError("can't start new thread")

    with pytest.raises(SystemExit):
        run_main(main)
    line = "error: can't start new thread: the limits of this process are too low; raise them (ulimit -u, ulimit -v)\n"
    assert capsys.readouterr().err == line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk_or_no_standard_output_is_no_traceback():
    code = "from hga_flax.errors import run_main; run_main(lambda: print('text', flush={}))"
    for flush in (False, True):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", code.format(flush)], stdout=full, stderr=-1, text=True)
        assert done.returncode == 1
        assert done.stderr == "error: standard output cannot be written: No space left on device\n"
    line = f'{shlex.quote(sys.executable)} -c "{code.format(True)}" >&-'
    done = subprocess.run(line, shell=True, stderr=-1, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_standard_output_cannot_encode_ends_no_command(encoding):
    """A file's name with a byte that is no UTF-8, as Python reads it, and characters that Latin-1 lacks."""
    code = r"from hga_flax.errors import run_main; run_main(lambda: print('caf\udce9 \xe9 \u732b'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    others = {"latin-1": b"\xe9 \\u732b", "ascii": b"\\xe9 \\u732b", "utf-8": "é 猫".encode()}
    assert done.stdout == b"caf\xe9 " + others[encoding] + b"\n"
