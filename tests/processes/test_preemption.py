import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from hga_flax.errors import Interrupted
from hga_flax.processes import preemption as module
from hga_flax.processes.preemption import Agreement, Preemption, exit_code
from tests.training import tiny


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def hangup():
    """As at a terminal, however the tests were started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_is_a_request_once_there_is_something_to_save():
    before = [signal.getsignal(s) for s in module.SIGNALS]
    left = []
    with Preemption(60.0, lambda *how: left.append(how)) as preemption:
        preemption.begin()
        signal.raise_signal(signal.SIGTERM)
        assert preemption.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat themselves
    assert left == []
    assert [signal.getsignal(s) for s in module.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_before_that_ends_the_command_at_once():
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)):
        with pytest.raises(Interrupted, match="nothing new to save") as caught, Preemption(60.0, lambda *how: None):
            signal.raise_signal(signum)
        assert caught.value.code == code == exit_code(signum) and caught.value.alone


def test_a_run_that_nohup_started_goes_on_ignoring_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Preemption(60.0, lambda *how: None) as preemption:
        preemption.begin()
        signal.raise_signal(signal.SIGHUP)
        assert preemption.signal == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


TERMINAL = """
import pathlib
import sys
import time
from hga_flax.processes.preemption import Preemption
with Preemption(60.0) as preemption:
    preemption.begin()
    print("ready", flush=True)
    while not preemption.signal:
        time.sleep(0.01)
    print("a line that nobody reads", flush=True)
    print("another", file=sys.stderr, flush=True)
    pathlib.Path(sys.argv[1]).write_text("saved")
"""


def test_the_end_of_its_terminal_is_no_reason_not_to_save(tmp_path):
    main, side = os.openpty()
    command = [sys.executable, "-c", TERMINAL, str(tmp_path / "file")]
    take = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is this process's, which hears of its end
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, start_new_session=True, preexec_fn=take, env=os.environ
    )
    os.close(side)
    assert b"ready" in os.read(main, 100)
    os.close(main)  # a lost connection
    assert process.wait(30) == 0 and (tmp_path / "file").read_text() == "saved"


def test_a_second_sigint_leaves_at_once():
    left = []
    with Preemption(60.0, lambda *how: left.append(how)) as preemption:
        preemption.begin()
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        assert left == []
        signal.raise_signal(signal.SIGINT)
        wait_for(lambda: left)
    assert left[0][0] == 130 and "at once" in left[0][1]


def test_the_end_of_the_grace_period_leaves():
    left = []
    with Preemption(0.2, lambda *how: left.append(how)) as preemption:
        preemption.begin()
        start = time.monotonic()
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: left)
    assert 0.2 <= time.monotonic() - start < 5 and left[0][0] == 143
    assert "training.grace_seconds" in left[0][1] and "kept" in left[0][1] and "\n" not in left[0][1]


BUSY = """
import hashlib
import sys
from hga_flax.processes.preemption import Preemption
with Preemption(float(sys.argv[1])) as preemption:
    if sys.argv[2] == "unsaved":
        preemption.begin()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.medium
@pytest.mark.parametrize(("what", "seconds", "line"), [("unsaved", 2.0, "after 2 s"), ("nothing", 9.0, "with nothing")])
def test_a_main_thread_that_does_not_answer_is_ended(what, seconds, line):
    """As in a compilation: no handler runs before the call returns, but the thread hears of the signal."""
    command = [sys.executable, "-c", BUSY, str(seconds), what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143 and time.monotonic() - start < 8
    assert error.count("\n") == 1 and line in error and "SIGTERM" in error


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def run():
        with Preemption(1.0) as preemption:
            preemption.begin()
            seen.append(preemption.signal)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [0]


class Asked:
    signal = 0


def test_one_process_knows_at_once_and_several_agree_some_steps_later():
    asked = Asked()
    alone, several = (Agreement(asked, tiny.mesh(8), processes) for processes in (1, 2))
    assert [alone.stop(), several.stop(), several.stop()] == [0, 0, 0]
    asked.signal = signal.SIGTERM
    assert alone.stop() == signal.SIGTERM
    # What is read was asked POLLS_IN_FLIGHT calls ago.
    assert [several.stop() for _ in range(4)] == [0, 0, signal.SIGTERM, signal.SIGTERM]


def test_agreeing_takes_the_largest_over_the_devices():
    agreement = Agreement(Asked(), tiny.mesh(8), 2)
    flags = jax.device_put(jnp.asarray([0, 0, 0, 15, 0, 2, 0, 0]), agreement._split)
    assert int(agreement._largest(flags)) == 15
