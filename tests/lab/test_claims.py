"""Claims: one owner at a time, whoever dies, stands still or comes late."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from hga_flax.errors import UserError
from hga_flax.lab.claims import Claims, machine, process_start


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def elsewhere(file, **more):
    """Makes a claim look like that of a worker on another machine."""
    file.write_text(json.dumps({"machine": "another", "pid": 1, "start": "1"} | more))


def test_one_of_many_gets_a_run(tmp_path):
    claims = [Claims(tmp_path) for _ in range(8)]
    together, got = threading.Barrier(8), []

    def take(own):
        together.wait()
        got.append(own.take("none.seed_0"))

    for number in range(5):
        got.clear()
        threads = [threading.Thread(target=take, args=(own,)) for own in claims]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        owned = [claim for claim in got if claim]
        assert len(owned) == 1 and owned[0].number == number and not owned[0].is_lost
        claims[0].release(owned[0])  # the next round is a race for what was given up


def test_a_living_owner_keeps_its_run_and_another_run_is_free(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("se.seed_1") and second.take("se.seed_1") is None
    assert second.take("se.seed_10") and second.take("se.seed_1.seed_1")  # names that begin alike


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path):
    code = "import sys, pathlib; from hga_flax.lab.claims import Claims; Claims(pathlib.Path(sys.argv[1])).take('a')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    claim = Claims(tmp_path).take("a")
    assert claim.number == 1


def test_a_reused_process_number_is_another_process(tmp_path):
    owner = {"machine": machine(), "pid": os.getpid(), "start": "long ago"}
    (tmp_path / "a.0").write_text(json.dumps(owner))
    assert Claims(tmp_path).take("a").number == 1
    assert process_start(os.getpid()) and process_start(2**22 + 1) is None


def test_another_machine_s_silence_is_measured_by_the_watcher_s_clock(tmp_path):
    clock = Clock()
    claims = Claims(tmp_path, stale_seconds=60, clock=clock)
    file = tmp_path / "a.0"
    elsewhere(file)
    os.utime(file, (0, 0))  # its clock may be years behind
    assert claims.take("a") is None
    clock.now = 59
    assert claims.take("a") is None
    os.utime(file, (1, 1))  # a sign of life
    clock.now = 100
    assert claims.take("a") is None
    clock.now = 161
    assert claims.take("a").number == 1


def test_an_owner_that_died_before_it_had_written_its_name(tmp_path):
    clock = Clock()
    claims = Claims(tmp_path, stale_seconds=60, clock=clock)
    (tmp_path / "a.0").write_text("")
    assert claims.take("a") is None
    clock.now = 61
    assert claims.take("a").number == 1


def test_who_was_silent_too_long_learns_that_the_run_is_another_s(tmp_path):
    clock = Clock()
    slow, other = Claims(tmp_path), Claims(tmp_path, stale_seconds=60, clock=clock)
    claim = slow.take("a")
    elsewhere(claim.file)
    assert other.take("a") is None
    clock.now = 61
    taken = other.take("a")
    assert claim.is_lost and not taken.is_lost
    slow.release(claim)  # comes too late to give up what is the other's
    assert slow.take("a") is None and not taken.is_lost


def test_a_claim_is_touched_while_its_run_is_made(tmp_path):
    claims = Claims(tmp_path, stale_seconds=0.12)
    claim, ticks = claims.take("a"), []
    os.utime(claim.file, (0, 0))
    with claims.beating(claim, lambda: ticks.append(claim.file.stat().st_mtime)):
        deadline = time.monotonic() + 20
        while len(ticks) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert ticks[0] > 0 and claim.file.stat().st_mtime > 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        Claims(tmp_path / "file" / "claims")
