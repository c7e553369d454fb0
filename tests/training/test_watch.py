"""Processes that watch each other, here threads over socket pairs; tests/training/test_distributed.py has real ones."""

import socket
import threading
import time

import jax
import pytest

from hga_flax.errors import Interrupted, UserError
from hga_flax.training import watch as module
from hga_flax.training.watch import ALIVE, FAILED, Link, Watch


class Run:
    """Watches of several processes, with what each would have printed before it ended."""

    def __init__(self, processes, timeout=5.0):
        pairs = [socket.socketpair() for _ in range(processes - 1)]
        self.far = [Link(far, 0) for _, far in pairs]
        links = [[Link(near, i + 1) for i, (near, _) in enumerate(pairs)]] + [[link] for link in self.far]
        self.ended, self.over = [None] * processes, [threading.Event() for _ in range(processes)]
        self.watches = [
            Watch(i, processes, timeout, connect=lambda p, n, t: links[p], leave=self.leave(i))
            for i in range(processes)
        ]

    def leave(self, process):
        def end(text):
            self.ended[process] = text
            self.over[process].set()

        return end

    def enter(self):
        for watch in self.watches:
            watch.__enter__()

    def exit(self, *order, error=None):
        threads = [
            threading.Thread(target=self.watches[p].__exit__, args=(type(error) if error else None, error, None))
            for p in order
        ]
        for thread in threads:
            thread.start()
        return threads


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_end_in_any_order_and_none_is_missed(order):
    run = Run(3)
    run.enter()
    threads = []
    for process in order:
        threads += run.exit(process)
        time.sleep(0.05)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert run.ended == [None, None, None]


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_signal_to_one_process_before_its_first_step_ends_all(stopped):
    """Later all agree on a step to stop at; before, the others would wait for this one in vain."""
    run = Run(3, timeout=60.0)
    run.enter()
    run.exit(stopped, error=Interrupted("stopped by SIGTERM; nothing new to save", 143, alone=True))
    for process in {0, 1, 2} - {stopped}:
        assert run.over[process].wait(2 * module.CONCLUSION_SECONDS + 20)
        line = f"process {stopped} on {socket.gethostname()} was stopped by SIGTERM; the checkpoints written before"
        assert run.ended[process].startswith(line)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_closed_connection_ends_all_others_with_the_cause(lost):
    run = Run(3)
    run.enter()
    run.far[lost - 1].socket.shutdown(socket.SHUT_RDWR)  # as the operating system does for a process that died
    others = [p for p in range(3) if p != lost]
    for process in others:
        assert run.over[process].wait(5)
        assert run.ended[process].startswith(f"process {lost} was lost (its connection is closed); the checkpoints")


def test_process_0_is_watched_too():
    run = Run(2)
    run.enter()
    run.watches[0]._links[0].socket.shutdown(socket.SHUT_RDWR)
    assert run.over[1].wait(5) and run.ended[1].startswith("process 0 was lost")


def test_silence_counts_as_loss():
    near, far = socket.socketpair()
    text, over = [], threading.Event()
    watch = Watch(0, 2, 0.5, connect=lambda *a: [Link(near, 1)], leave=lambda t: (text.append(t), over.set()))
    start = time.monotonic()
    with watch:
        for _ in range(5):  # alive for a while
            time.sleep(0.2)
            Link(far, 0).send(ALIVE)
        assert not over.is_set()
        assert over.wait(5) and time.monotonic() - start > 1.4
    assert text[0].startswith("process 1 was lost (silent for 0.5 s, training.lost_process_seconds)")


def test_signs_of_life_keep_idle_processes_together():
    run = Run(3, timeout=0.4)
    run.enter()
    time.sleep(1.5)
    assert run.ended == [None, None, None]
    for thread in run.exit(0, 1, 2):
        thread.join(5)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_is_told_to_the_others(failing, monkeypatch):
    monkeypatch.setattr("hga_flax.training.watch.CONCLUSION_SECONDS", 0.1)
    run = Run(3)
    run.enter()
    run.exit(failing, error=UserError("more than 10 images\ncannot be decoded"))
    for process in {0, 1, 2} - {failing}:
        assert run.over[process].wait(5)
        assert f"process {failing} on " in run.ended[process]
        assert "failed: more than 10 images cannot be decoded; the checkpoints" in run.ended[process]
    assert run.ended[failing] is None


def test_the_same_error_in_all_processes_ends_each_by_itself():
    run = Run(2)
    run.enter()
    threads = run.exit(1, error=UserError("training diverged"))
    time.sleep(0.2)
    threads += run.exit(0, error=UserError("training diverged"))  # within the time that it is given
    for thread in threads:
        thread.join(8)
        assert not thread.is_alive()
    assert run.ended == [None, None]


def test_a_collective_that_fails_because_of_a_loss_is_no_error_of_ours():
    near, far = socket.socketpair()
    watch = Watch(0, 2, 5.0, connect=lambda *a: [Link(near, 1)], leave=lambda text: None)
    with pytest.raises(UserError, match="another process was lost"), watch:
        far.close()
        raise jax.errors.JaxRuntimeError("Gloo: connection reset")


def test_messages_are_put_together_from_their_pieces():
    near, far = socket.socketpair()
    link = Link(near, 1)
    far.sendall(b"alive \nfai")
    assert link.receive() == [(ALIVE, "")]
    far.sendall(b"led a b c\n")
    assert link.receive() == [(FAILED, "a b c")]
    far.close()
    assert link.receive() is None


def test_process_0_waits_until_the_others_have_disconnected():
    near, far = socket.socketpair()
    order = []
    watches = [
        Watch(0, 2, 5.0, connect=lambda *a: [Link(near, 1)], leave=order.append, disconnect=lambda: order.append("0")),
        Watch(
            1, 2, 5.0, connect=lambda *a: [Link(far, 0)], leave=order.append,
            disconnect=lambda: (time.sleep(0.5), order.append("1")),
        ),
    ]  # fmt: skip
    for watch in watches:
        watch.__enter__()
    other = threading.Thread(target=watches[1].__exit__, args=(None, None, None))
    other.start()
    watches[0].__exit__(None, None, None)
    order.append("left")
    other.join(5)
    assert order == ["1", "left"]


def test_alone_it_does_nothing():
    with Watch(0, 1, 1.0) as watch:
        assert watch._links == []


def test_what_is_to_be_done_before_leaving_is_done_for_a_while(monkeypatch, capsys):
    done, codes = [], []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.3)
    with module.before_leaving(lambda: done.append("uploaded")), module.before_leaving(lambda: 1 / 0):
        module.leave("process 1 was lost")
    with module.before_leaving(lambda: time.sleep(60)):
        module.leave("process 2 was lost")
    module.leave("process 3 was lost")
    assert done == ["uploaded"] and codes == [1, 1, 1]
    assert capsys.readouterr().err == "".join(f"error: process {n} was lost\n" for n in (1, 2, 3))
