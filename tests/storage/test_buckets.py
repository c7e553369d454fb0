import importlib.util
import os
import shutil
import signal
import socket
import threading
import time

import pytest

from hga_flax.errors import Interrupted, UserError, called
from hga_flax.storage import buckets as storage
from hga_flax.storage.buckets import Remote, Unreachable, fetch_file, is_remote
from tests import buckets, gcs_emulator


def test_addresses_are_told_from_paths():
    assert is_remote("gs://a/b") and is_remote("s3://a")
    assert not any(map(is_remote, ("gs:/a", "/gs", "gs", "http://a", "az://a/b", "~/x", "")))
    assert storage.folder_name("s3://a/run") != storage.folder_name("gs://a/run")
    assert storage.folder_name("s3://a/run").startswith("run-")


@pytest.mark.parametrize("address", ["s3://", "s3:///", "s3://b/../c", "s3://b/./c"])
def test_an_address_names_a_bucket_and_stays_in_it(bucket, address):
    with pytest.raises(UserError, match=r"--workdir=s3://.*: write s3://BUCKET/FOLDER"):
        Remote(address, "--workdir")
    assert Remote("s3://b//c/", "--workdir").address == "s3://b/c"


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for scheme, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        with pytest.raises(UserError, match=f"^--workdir={scheme}://b/r: needs the package {package}: pip install "):
            Remote(f"{scheme}://b/r", "--workdir")


def copies(remote, tmp_path):
    """Takes files through every operation."""
    assert remote.files() == {}
    (tmp_path / "c").mkdir()
    for name, content in {"c/f": b"12345", "c/e": b"", "log": b"x" * 10}.items():
        (tmp_path / name).write_bytes(content)
    remote.put(tmp_path, ["c/f", "c/e", "log"])
    remote.write("x", b"{}")
    first = remote.files()
    assert {name: fact.size for name, fact in first.items()} == {"c/f": 5, "c/e": 0, "log": 10, "x": 2}
    (tmp_path / "c/f").write_bytes(b"54321")
    time.sleep(0.01)
    remote.put(tmp_path, ["c/f"])
    second = remote.files()
    assert second["c/f"].mark != first["c/f"].mark and second["log"] == first["log"]
    remote.copy(["f", "e"], "c", "d/k")
    done = []
    remote.get(["d/k/f", "log"], tmp_path / "back", done.append)
    assert (tmp_path / "back/d/k/f").read_bytes() == b"54321" and sorted(done) == ["d/k/f", "log"]
    assert sorted(p.name for p in (tmp_path / "back").rglob("*")) == ["d", "f", "k", "log"]  # no scratch file
    with pytest.raises(FileNotFoundError):
        remote.read("c/g")
    with pytest.raises(FileNotFoundError):
        remote.get(["c/g"], tmp_path / "back")
    with pytest.raises(FileNotFoundError):
        remote.put(tmp_path, ["c/g"])
    assert remote.read("x") == b"{}" and remote.below("d").files().keys() == {"k/f", "k/e"}
    remote.delete(["c/f", "c/e", "d/k/f", "d/k/e", "never"])
    assert remote.files().keys() == {"log", "x"}


def test_files_are_copied_both_ways(bucket, tmp_path, monkeypatch):
    copies(Remote(f"{bucket}/a/run", "key"), tmp_path)
    monkeypatch.setattr(storage, "SMALL", 3)
    for folder in ("c", "back"):
        shutil.rmtree(tmp_path / folder)
    copies(Remote(f"{bucket}/a/other", "key"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param(s, marks=buckets.needs(s)) for s in ("s3", "gs")])
def test_files_are_copied_both_ways_by_the_real_protocols(scheme, tmp_path, monkeypatch):
    with buckets.serve(scheme):
        copies(Remote(f"{scheme}://bucket/a/run", "key"), tmp_path)
        monkeypatch.setattr(storage, "SMALL", 3)
        for folder in ("c", "back"):
            shutil.rmtree(tmp_path / folder)
        copies(Remote(f"{scheme}://bucket/a/other", "key"), tmp_path)
        for act in (lambda r: r.files(), lambda r: r.write("x", b""), lambda r: r.put(tmp_path, ["log"])):
            with pytest.raises(Unreachable, match=r"there is no bucket nobucket; create it, or correct the name"):
                act(Remote(f"{scheme}://nobucket/run", "key"))


@pytest.mark.slow
@buckets.needs("gs")
@pytest.mark.parametrize("small", [storage.SMALL, 3])
def test_a_file_that_changes_on_its_way_is_one_line(tmp_path, monkeypatch, small):
    """S3's clients send a checksum, and S3 compares it; GCS answers with its own, which gcsfs compares if told to."""
    monkeypatch.setattr(storage, "SMALL", small)
    (tmp_path / gcs_emulator.DAMAGED_ON_THE_WAY).write_bytes(b"weights\r")
    (tmp_path / "whole").write_bytes(b"weights\r")
    with buckets.serve("gs"):
        remote = Remote("gs://bucket/run", "key")
        remote.put(tmp_path, ["whole"])
        assert remote.read("whole") == b"weights\r"
        with pytest.raises(Unreachable, match=r"^key=gs://bucket/run cannot be written to: a file did not arrive"):
            remote.put(tmp_path, [gcs_emulator.DAMAGED_ON_THE_WAY])
        with pytest.raises(Unreachable, match="did not arrive there as it was sent"):
            remote.write(gcs_emulator.DAMAGED_ON_THE_WAY, b"{}")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param(s, marks=buckets.needs(s)) for s in ("s3", "gs")])
def test_an_endpoint_that_is_not_there_is_one_line(scheme, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_ANSWER_SECONDS", 60.0)
    for name, value in (buckets.ENVIRONMENTS[scheme] | {buckets.ENDPOINTS[scheme]: "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    import fsspec

    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    start = time.monotonic()
    with pytest.raises(Unreachable, match=r"the storage does not answer .*; is the network up, and the endpoint right"):
        Remote(f"{scheme}://bucket/run", "key").files()
    assert time.monotonic() - start < 70
    fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_after_the_first_failure_no_file_is_tried(monkeypatch, error):
    tried = []

    def fail(name):
        tried.append(name)
        time.sleep(0.02)
        if error is ConnectionError:
            raise error

    def interrupt(*arguments, **more):
        raise error

    if error is KeyboardInterrupt:  # while it waits
        monkeypatch.setattr(storage.concurrent.futures, "wait", interrupt)
    with pytest.raises(error):
        storage._all(fail, map(str, range(1000)))
    assert len(tried) < 10 * storage.AT_ONCE


class NoCredentialsError(Exception):
    pass


class EndpointConnectionError(Exception):
    pass


class HttpError(Exception):
    code = 403


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError("b"), "there is no bucket b; create it, or correct the name"),
        (NoCredentialsError("Unable"), "no credentials, or invalid ones (Unable); log in"),
        (PermissionError("Access Denied"), "no permission (Access Denied); ask for it, or: log in"),
        (HttpError("Forbidden"), "no permission (Forbidden); ask for it, or: log in"),
        (EndpointConnectionError("no\nroute"), "the storage does not answer (no route); is the network up, and"),
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device"),
        (OSError(28, "No space left on device"), "/c/a/che: No space left on device (on this machine)"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_what_the_libraries_raise_is_one_line(bucket, monkeypatch, error, line):
    remote = Remote("s3://b/run", "--workdir")
    monkeypatch.setenv(storage.CACHE_VARIABLE, "/c/a/che")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(remote, "_find", fail)
    with pytest.raises(Unreachable) as caught:
        remote.files()
    assert str(caught.value).startswith(f"--workdir=s3://b/run cannot be read: {line}")


def test_a_bucket_that_does_not_exist_and_one_that_does_not_answer(bucket, monkeypatch):
    with pytest.raises(Unreachable, match="there is no bucket nobucket"):
        Remote("s3://nobucket/run", "key").files()
    monkeypatch.setattr(storage, "FIRST_ANSWER_SECONDS", 0.1)
    remote = Remote(f"{bucket}/run", "key")
    monkeypatch.setattr(remote, "_find", lambda: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(Unreachable, match=r"the storage does not answer \(no answer within 0\.1 s\)"):
        remote.files()
    assert time.monotonic() - start < 2


def test_a_name_that_leads_out_of_the_folder_is_not_copied(bucket):
    assert [
        name for name in ("a/b", "../x", "a/../../x", "/etc/x", "a/", "", "a//b", "a/./b") if storage._safe(name)
    ] == ["a/b"]


class ClientPayloadError(Exception):
    """What aiohttp raises where a connection breaks off in the middle of a body."""


def test_a_file_whose_connection_breaks_off_is_read_again(bucket, tmp_path, monkeypatch):
    remote, tries = Remote(f"{bucket}/run", "key"), []
    remote.write("x", b"content")
    get = remote._fs().get_file

    def break_off(*arguments):
        tries.append(1)
        if len(tries) in breaks:
            raise ClientPayloadError("Not enough data")
        return get(*arguments)

    monkeypatch.setattr(type(remote._fs()), "get_file", lambda self, *arguments: break_off(*arguments))
    breaks = {1, 2}
    remote.get(["x"], tmp_path)
    assert (tmp_path / "x").read_bytes() == b"content" and len(tries) == 3
    breaks = {4, 5, 6}
    with pytest.raises(Unreachable, match="ClientPayloadError: Not enough data"):
        remote.get(["x"], tmp_path)
    assert len(tries) == 6


def test_a_file_is_no_folder_and_what_cannot_be_written_here_is_one_line(bucket, tmp_path):
    remote = Remote(f"{bucket}/run", "key")
    remote.write("a", b"1")
    with pytest.raises(UserError, match=rf"^key={bucket}/run/a: this is a file, not a folder$"):
        remote.below("a").files()
    (tmp_path / "b").write_text("")
    remote.write("b/c", b"1")
    with pytest.raises(
        Unreachable, match=r"^key=.* cannot be read: .*/b: (File exists|Not a directory) \(on this mach"
    ):
        remote.get(["b/c"], tmp_path)


@pytest.mark.parametrize("error", [PermissionError("no"), OSError("Forbidden: https://storage/b"), OSError("other")])
def test_rights_may_be_limited_to_a_folder(bucket, monkeypatch, error):
    remote = Remote(f"{bucket}/mine", "key")

    def deny(*arguments):
        raise error

    monkeypatch.setattr(type(remote._fs()), "ls", deny)
    monkeypatch.setattr(remote, "_find", dict)
    if str(error) == "other":
        with pytest.raises(Unreachable):
            remote.files()
    else:
        assert remote.files() == {}


def test_a_signal_does_not_wait_for_the_files_in_progress():
    started, over = threading.Event(), threading.Event()

    def slow(name):
        started.set()
        over.wait(20)

    def stop(*arguments):
        raise Interrupted("stopped by SIGTERM", 143)

    before = signal.signal(signal.SIGUSR1, stop)

    def kill():
        started.wait()
        time.sleep(0.3)  # a signal between Python's last look and the system's call to wait would interrupt nothing
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=kill).start()
    start = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            storage._all(slow, ["a"])
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - start < 10


@pytest.mark.slow
@buckets.needs("gs")
def test_a_storage_that_takes_a_request_and_never_answers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(storage.PATIENCE, "gs", {"sock_connect": 0.5, "sock_read": 0.5})
    (tmp_path / "x").write_bytes(b"1")
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        monkeypatch.setenv(buckets.ENDPOINTS["gs"], f"http://127.0.0.1:{silent.getsockname()[1]}")
        import fsspec

        fsspec.get_filesystem_class("gs").clear_instance_cache()
        with pytest.raises(Unreachable, match=r"the storage does not answer .*; is the network up, and the endpoint"):
            Remote("gs://bucket/run", "key").put(tmp_path, ["x"])
        fsspec.get_filesystem_class("gs").clear_instance_cache()


def test_no_room_and_no_right_are_one_line(tmp_path, monkeypatch):
    storage.check_space(tmp_path, 1, "data.dir=s3://b")
    with pytest.raises(UserError, match=r"^data\.dir=s3://b: its 1,000,000,000\.0 GB do not fit.* HGA_FLAX_CACHE"):
        storage.check_space(tmp_path, 10**18, "data.dir=s3://b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^s3://b cannot be copied to .*: Not a directory; set HGA_FLAX_CACHE"):
        storage.make_folder(tmp_path / "file" / "x", "s3://b")
    monkeypatch.setenv(storage.CACHE_VARIABLE, "~/mine")
    assert str(storage.cache_folder()) == os.path.expanduser("~/mine")


def test_messages_call_a_copy_by_its_address(tmp_path):
    storage.make_folder(tmp_path / "copy", "s3://b/run")
    assert str(UserError(f"{tmp_path}/copy/config.json is damaged")) == "s3://b/run/config.json is damaged"
    assert called(tmp_path) == str(tmp_path)


def test_one_file_is_fetched_once_and_again_when_it_changes(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(Remote, "files", lambda self: pytest.fail("what lies beside it is not listed"))
    remote = Remote(f"{bucket}/weights", "key")
    remote.write("a.pth", b"1")
    file = fetch_file(f"{bucket}/weights/a.pth", "init.weights")
    assert file.read_bytes() == b"1" and file.name == "a.pth"
    time.sleep(0.01)
    remote.write("a.pth", b"2")
    assert fetch_file(f"{bucket}/weights/a.pth", "init.weights").read_bytes() == b"2"
    with pytest.raises(UserError, match=rf"^init\.weights={bucket}/weights/b\.pth: there is no such file$"):
        fetch_file(f"{bucket}/weights/b.pth", "init.weights")
    with pytest.raises(UserError, match=rf"^init\.weights={bucket}/weights: there is no such file$"):
        fetch_file(f"{bucket}/weights", "init.weights")  # a folder
    with pytest.raises(Unreachable, match="there is no bucket nobucket; create it, or correct the name"):
        fetch_file("s3://nobucket/weights/a.pth", "init.weights")
    (tmp_path / "full").write_text("")
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "full"))
    with pytest.raises(UserError, match=rf"^{bucket}/weights cannot be copied to .*: Not a directory; set HGA_FLAX_"):
        fetch_file(f"{bucket}/weights/a.pth", "init.weights")


def test_a_signal_is_no_failure_of_the_storage(bucket, monkeypatch):
    def interrupt(*arguments):
        raise Interrupted("stopped by SIGTERM", 143)

    monkeypatch.setattr(storage.Remote, "_fs", interrupt)
    with pytest.raises(Interrupted):
        Remote(f"{bucket}/run", "key").files()
