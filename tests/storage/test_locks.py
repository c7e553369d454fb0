"""Claims: one owner at a time, whoever dies, stands still or comes late. Locks: one process at a time."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from hga_flax.errors import UserError
from hga_flax.storage.locks import Claims, claimed, lock, machine, process_start, surely_lost

HOLD = """
import pathlib, sys
from hga_flax.storage.locks import lock
held = lock(pathlib.Path(sys.argv[1]), wait=False)
print(held is not None, flush=True)
sys.stdin.read()
"""

CLAIM_FOR_GOOD = """
import pathlib, sys
from hga_flax.storage.locks import claimed
never_left = claimed(pathlib.Path(sys.argv[1]), "x", RuntimeError, print, lambda: None)
never_left.__enter__()
print("held")
"""


def test_one_process_has_it_until_it_ends_however_that_is(tmp_path):
    file = tmp_path / "new" / "x.lock"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "True\n"
        assert lock(file, wait=False) is None
        other.kill()
        with lock(file, wait=True):  # which comes when the other is gone
            assert other.wait() < 0 and lock(file, wait=False) is None
    with lock(file, wait=False):
        pass


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        lock(tmp_path / "file" / "x.lock", wait=True)


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


def test_a_claim_of_the_same_name_in_a_folder_made_anew_is_another_ones(tmp_path):
    """As after `rm -r` of a workdir in which a run still trains, and a new start there."""
    folder = tmp_path / "run"
    first = Claims(folder).take("a")
    shutil.rmtree(folder)
    assert first.is_lost
    other = Claims(folder)
    second = other.take("a")
    assert second.file == first.file and first.is_lost and not second.is_lost
    Claims(folder).release(first)
    assert not json.loads(second.file.read_text()).get("released") and other.is_held("a")
    other.release(second)
    assert json.loads(second.file.read_text())["released"] and Claims(folder).take("a").number == 1


def test_a_claim_that_a_full_disk_refuses_leaves_nothing_behind(tmp_path, monkeypatch):
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"a\.0 cannot be written: No space left on device; .* same command goes on"):
        Claims(tmp_path).take("a")
    monkeypatch.setattr(json, "dumps", dumps)
    assert not list(tmp_path.iterdir()) and Claims(tmp_path).take("a").number == 0


def test_a_living_owner_keeps_its_run_and_another_run_is_free(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("se.seed_1") and second.take("se.seed_1") is None
    assert second.take("se.seed_10") and second.take("se.seed_1.seed_1")  # names that begin alike


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path):
    code = "import sys, pathlib; from hga_flax.storage.locks import Claims; Claims(pathlib.Path(sys.argv[1])).take('a')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    claim = Claims(tmp_path).take("a")
    assert claim.number == 1


def test_a_reused_process_number_is_another_process(tmp_path):
    owner = {"machine": machine(), "pid": os.getpid(), "start": "long ago"}
    (tmp_path / "a.0").write_text(json.dumps(owner))
    assert Claims(tmp_path).take("a").number == 1
    assert process_start(os.getpid()) and process_start(2**22 + 1) is None


def test_an_owner_that_proc_hides_is_judged_by_its_silence(tmp_path, monkeypatch):
    """As another user's process where /proc is mounted with hidepid=2."""
    clock, read = Clock(), pathlib.Path.read_text
    owner = {"machine": machine(), "pid": os.getpid(), "start": process_start(os.getpid())}
    (tmp_path / "a.0").write_text(json.dumps(owner))
    monkeypatch.setattr(
        pathlib.Path, "read_text", lambda self: read(self) if self.name != "stat" else read(pathlib.Path("/gone"))
    )
    claims = Claims(tmp_path, stale_seconds=60, clock=clock)
    assert process_start(os.getpid()) == "" and process_start(2**22 + 1) is None
    assert claims.take("a") is None and claims.is_elsewhere("a")
    clock.now = 61
    assert claims.take("a").number == 1


def test_a_folder_that_has_another_path_in_the_owner_s_container_is_no_copy(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    Claims(run).take("a")
    owner = json.loads((run / "a.0").read_text())
    (run / "a.0").write_text(json.dumps(owner | {"folder": str(other)}))  # there it is this folder
    assert Claims(run).take("a") is None
    (run / "a.0").write_text(
        json.dumps(owner | {"folder": str(other), "inode": [other.stat().st_dev, other.stat().st_ino]})
    )
    assert Claims(run).take("a").number == 1


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


def test_claims_do_not_pile_up_and_who_comes_late_gets_none(tmp_path, monkeypatch):
    claims = Claims(tmp_path)
    for _ in range(5):
        claims.release(claims.take("a"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.4"]
    late, looks = Claims(tmp_path), iter([{1}, {2, 4}])
    monkeypatch.setattr(late, "_numbers", lambda name: next(looks))  # it looked when there was but the second
    monkeypatch.setattr(late, "_is_gone", lambda file: True)
    assert late.take("a") is None
    assert [file.name for file in tmp_path.iterdir()] == ["a.4"]


CLAIM = """
import pathlib, sys
from hga_flax.errors import UserError, run_main
from hga_flax.storage.locks import claimed
def main():
    with claimed(pathlib.Path(sys.argv[1]), "x", lambda who: UserError(f"taken by {who}"), print, print):
        print("ready", flush=True)
        sys.stdin.read()
run_main(main)
"""


def claim(folder, **options):
    taken = lambda who: UserError(f"taken by {who}")
    return claimed(folder, "x", taken, options.pop("say", print), options.pop("lost", print), **options)


def test_a_claim_refuses_others_by_process_and_host_and_ends_with_its_process(tmp_path):
    command, pipe = [sys.executable, "-c", CLAIM, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        line = f"taken by process {other.pid} on {socket.gethostname()}"
        with pytest.raises(UserError, match=f"^{line}$"), claim(tmp_path):
            pass
        other.kill()
    with claim(tmp_path):  # at once
        second = subprocess.run(command, input="", capture_output=True, text=True)
        assert second.returncode == 1
        assert second.stderr == f"error: taken by process {os.getpid()} on {socket.gethostname()}\n"
    with claim(tmp_path):  # given up in good order
        pass


def test_an_owner_elsewhere_is_waited_for_until_it_shows_whether_it_lives(tmp_path):
    """Whatever the file system: nothing is asked of it but exclusive creation and times of changes."""
    file, said = tmp_path / "x.0", []
    elsewhere(file, host="node7", pid=12)
    with claim(tmp_path, say=said.append, stale_seconds=0.3):  # dead: it stays silent
        assert said == ["process 12 on node7 may still be at work here; waiting up to 0.3 s for a sign of life"]
    elsewhere(tmp_path / "x.1", host="node7", pid=12)

    def live():
        for seconds in range(1, 1000):
            if ended.wait(0.02):
                return
            os.utime(tmp_path / "x.1", (seconds, seconds))

    ended = threading.Event()
    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(UserError, match="taken by process 12 on node7"), claim(tmp_path, stale_seconds=5.0):
        pass
    ended.set()
    thread.join()
    with pytest.raises(UserError, match="taken by process 12 on node7"), claim(tmp_path, waits=False):
        pass


def test_an_owner_that_was_taken_over_is_told(tmp_path):
    told = threading.Event()
    with claim(tmp_path, lost=told.set, stale_seconds=0.12):
        elsewhere(tmp_path / "x.1")
        assert told.wait(20)
    assert json.loads((tmp_path / "x.1").read_text())["machine"] == "another"  # not given up by this one


def test_a_script_that_never_releases_its_claim_ends(tmp_path):
    command = [sys.executable, "-c", CLAIM_FOR_GOOD, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "held\n", "")
    claim, = tmp_path.glob("x.*")  # fmt: skip
    assert json.loads(claim.read_text())["released"] is True


def test_a_file_server_that_does_not_say_takes_no_claim_away(tmp_path, monkeypatch):
    claim = Claims(tmp_path).take("a")

    def stale(self, **more):
        raise OSError(116, "Stale file handle", str(self))

    monkeypatch.setattr(pathlib.Path, "stat", stale)
    assert not surely_lost(claim)
    with pytest.raises(OSError, match="Stale"):
        _ = claim.is_lost


def test_a_claim_that_was_copied_with_its_folder_owns_nothing(tmp_path):
    assert Claims(tmp_path / "run").take("a")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert Claims(tmp_path / "run").take("a") is None and Claims(tmp_path / "link").take("a") is None
    assert Claims(tmp_path / "copy").take("a")
