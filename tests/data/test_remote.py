import json
import os
import pathlib
import shutil
import threading
import time

import pytest

from hga_flax.__main__ import main
from hga_flax.data import remote as r
from hga_flax.data.remote import find_set, local_directory
from hga_flax.data.sources import dataset_info, open_source
from hga_flax.errors import UserError
from hga_flax.storage.buckets import Remote, Unreachable
from tests import buckets, commands
from tests.test_train import TINY

VARIABLE = "TFDS_DATA_DIR"


def put_digits(address):
    """Uploads the tests' prepared digits and returns how many files they are."""
    open_source("digits", "test")
    local = pathlib.Path(os.environ[VARIABLE])
    names = [p.relative_to(local).as_posix() for p in (local / "digits/1.0.0").iterdir()]
    Remote(address, "data.dir").put(local, names)
    return len(names)


def put_sets(address, *sets):
    remote = Remote(address, "data.dir")
    for folder in sets:
        for name in ("x.array_record", r.MARKER):
            remote.write(f"{folder}/{name}", folder.encode())
    return remote


def test_a_set_is_copied_once_and_read_as_one_of_this_machine(bucket, capfd, monkeypatch):
    count = put_digits(f"{bucket}/data")
    got, get = [], Remote.get
    monkeypatch.setattr(Remote, "get", lambda self, n, *rest: (got.extend(n := list(n)), get(self, n, *rest)))
    info = dataset_info("digits", f"{bucket}/data")
    assert info == dataset_info("digits") and len(got) == count
    there, here = open_source("digits", "test", f"{bucket}/data"), open_source("digits", "test")
    assert len(there) == len(here) == 297 and there[7] == here[7] and len(got) == count
    told = capfd.readouterr().err
    assert told.startswith(f"copying {bucket}/data/digits/1.0.0, 0.00 GB, to ") and told.count("\n") == 1


def test_only_the_set_that_is_named_is_copied_and_the_newest_of_its_versions(bucket):
    put_sets(f"{bucket}/data", "a/1.0.0", "a/9.0.0", "a/10.0.0", "b/1.0.0", "c/small/1.0.0", "c/large/1.0.0")
    folder = pathlib.Path(local_directory(f"{bucket}/data", "a"))
    copied = lambda: sorted(str(p.parent.relative_to(folder)) for p in folder.rglob(r.MARKER))
    assert copied() == ["a/10.0.0"]
    local_directory(f"{bucket}/data", "a:1.0.0")
    local_directory(f"{bucket}/data", "c/small")
    local_directory(f"{bucket}/data", "not_there")
    assert copied() == ["a/1.0.0", "a/10.0.0", "c/small/1.0.0"]
    with pytest.raises(UserError, match=r"data\.name=c: .* has several configurations \(large, small\); write c/small"):
        local_directory(f"{bucket}/data", "c")


def test_a_copy_of_a_version_that_the_bucket_has_no_more_is_not_used(bucket):
    remote = put_sets(f"{bucket}/data", "a/1.0.0", "a/2.0.0", "c/small/1.0.0", "b/1.0.0")
    folder = pathlib.Path(local_directory(f"{bucket}/data", "a"))
    for name in ("c", "b"):
        local_directory(f"{bucket}/data", name)
    (folder / "a/3.0.0.incomplete").mkdir()  # another command prepares
    copied = lambda: sorted(str(p.parent.relative_to(folder)) for p in folder.rglob(r.MARKER))
    remote.delete([f"a/2.0.0/{r.MARKER}", *(f"c/small/1.0.0/{name}" for name in ("x.array_record", r.MARKER))])
    local_directory(f"{bucket}/data", "a")
    assert copied() == ["a/1.0.0", "b/1.0.0", "c/small/1.0.0"] and (folder / "a/3.0.0.incomplete").exists()
    local_directory(f"{bucket}/data", "c/small")
    assert copied() == ["a/1.0.0", "b/1.0.0"]


def test_a_set_that_is_not_complete_there_is_not_prepared(bucket):
    remote = put_sets(f"{bucket}/data", "digits/0.0.1")
    remote.delete([f"digits/0.0.1/{r.MARKER}"])
    assert find_set(remote, "digits") is None
    put_sets(f"{bucket}/data", "mine/1.0.0")
    with pytest.raises(UserError, match=f"cifar10 is not prepared in {bucket}/data; .* --data-dir={bucket}/data"):
        open_source("cifar10", "test", f"{bucket}/data")
    with pytest.raises(UserError, match=r"a folder of images must be on this machine; to use a bucket, pack"):
        dataset_info("folder", f"{bucket}/data")


def test_a_set_that_has_changed_is_copied_again(bucket):
    put_sets(f"{bucket}/data", "a/1.0.0")
    file = pathlib.Path(local_directory(f"{bucket}/data", "a")) / "a/1.0.0/x.array_record"
    assert file.read_bytes() == b"a/1.0.0"
    time.sleep(0.01)
    Remote(f"{bucket}/data", "key").write("a/1.0.0/x.array_record", b"new")
    local_directory(f"{bucket}/data", "a")
    assert file.read_bytes() == b"new"


def test_a_copy_that_was_cut_short_is_made_anew_and_of_two_at_once_one_waits(bucket, monkeypatch):
    put_sets(f"{bucket}/data", "a/1.0.0")
    root, (started, going, got), get = r.copies_of(f"{bucket}/data"), ([], threading.Event(), []), Remote.get
    (root / "a/.copying-1.0.0").mkdir(parents=True)
    (root / "a/.copying-1.0.0/x.array_record").write_bytes(b"cut")

    def slow(self, names, *rest):
        started.append(1)
        going.wait(10)
        got.extend(names := list(names))
        get(self, names, *rest)

    monkeypatch.setattr(Remote, "get", slow)
    threads = [threading.Thread(target=local_directory, args=(f"{bucket}/data", "a")) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert len(started) == 1 and not (root / "a/1.0.0").exists()
    going.set()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and (root / "a/1.0.0/x.array_record").read_bytes() == b"a/1.0.0"


def test_of_a_copy_that_was_interrupted_the_rest_is_copied_and_of_a_damaged_one_what_is_damaged(bucket, monkeypatch):
    put_sets(f"{bucket}/data", "a/1.0.0")
    remote, get, asked = Remote(f"{bucket}/data/a/1.0.0", "key"), Remote.get, []
    for name in ("x1", "x2"):
        remote.write(name, b"1")

    def interrupted(self, names, folder, done):
        asked.append(names := sorted(names))
        get(self, names[:2] if len(asked) == 1 else names, folder, done)
        if len(asked) == 1:
            raise Unreachable("gone")

    monkeypatch.setattr(Remote, "get", interrupted)
    with pytest.raises(Unreachable):
        local_directory(f"{bucket}/data", "a")
    folder = pathlib.Path(local_directory(f"{bucket}/data", "a")) / "a/1.0.0"
    assert asked[1] == asked[0][2:] and {p.name for p in folder.iterdir()} == {*asked[0], r.RECORD}
    (folder / "x1").write_bytes(b"")
    local_directory(f"{bucket}/data", "a")
    assert (folder / "x1").read_bytes() == b"1" and len(asked) == 3
    remote.write("x2", b"another")  # and an attempt at a set that is no longer there is not gone on with
    folder.rename(folder.with_name(".copying-1.0.0"))
    local_directory(f"{bucket}/data", "a")
    assert len(asked[3]) == 4 and (folder / "x2").read_bytes() == b"another"


def test_a_folder_that_cannot_be_written_to_is_one_line(bucket, monkeypatch):
    put_sets(f"{bucket}/data", "a/1.0.0")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(r, "_record", full)
    with pytest.raises(UserError, match=rf"^{bucket}/data/a/1\.0\.0 cannot be copied to .*: No space left on device$"):
        local_directory(f"{bucket}/data", "a")


def test_a_set_for_which_there_is_no_room_is_one_line(bucket, monkeypatch):
    put_sets(f"{bucket}/data", "a/1.0.0")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=rf"^{bucket}/data/a/1\.0\.0: its 0\.0 GB do not fit in .* HGA_FLAX_CACHE"):
        local_directory(f"{bucket}/data", "a")


def test_the_variable_of_tfds_may_be_an_address_too(bucket, monkeypatch):
    put_sets(f"{bucket}/data", "a/1.0.0")
    monkeypatch.setenv(VARIABLE, f"{bucket}/data")
    assert local_directory("", "a") == str(r.copies_of(f"{bucket}/data"))
    assert local_directory("/data", "a") == "/data"


def make_folder(root):
    import cv2
    import numpy as np

    for split, images in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                cv2.imwrite(str(root / split / name / f"{i}.png"), np.full((8, 8, 3), 20 * i, np.uint8))
    return root


def test_a_folder_is_packed_into_a_bucket_its_marker_last(bucket, tmp_path, capsys, monkeypatch):
    put, order = Remote.put, []
    monkeypatch.setattr(Remote, "put", lambda self, f, n: (order.extend(n := list(n)), put(self, f, n)))
    address = f"{bucket}/data"
    command = ["prepare", "folder", str(make_folder(tmp_path / "pets")), f"--data-dir={address}"]
    main(command)
    assert order[-1] == r.MARKER and len(order) == len(set(order)) >= 4
    told = f"{address}/pets/1.0.0\nuse it with --config.data.name=pets --config.data.dir={address}\n"
    assert capsys.readouterr().out == told
    with pytest.raises(UserError, match=f"^{address}/pets already exists; choose another --name or remove it$"):
        main(command)
    copies = r.copies_of(address)
    before = (copies / "pets/1.0.0" / r.MARKER).stat().st_mtime_ns
    assert len(open_source("pets", "train", address)) == 8  # what was packed here serves as the copy
    assert (copies / "pets/1.0.0" / r.MARKER).stat().st_mtime_ns == before
    Remote(address, "key").delete([f"pets/1.0.0/{r.MARKER}"])  # as a killed upload leaves it
    main(command)
    assert len(open_source("pets", "val", address)) == 4
    shutil.rmtree(copies)
    assert len(open_source("pets", "val", address)) == 4 and json.loads((copies / "pets/1.0.0" / r.RECORD).read_text())


def test_a_tfds_set_that_is_there_is_not_prepared_again(bucket, capsys):
    put_digits(f"{bucket}/data")
    main(["prepare", "digits", f"--data-dir={bucket}/data"])
    assert capsys.readouterr().out.startswith(f"digits is already prepared:\n{bucket}/data/digits/1.0.0\nuse it with ")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param(s, marks=buckets.needs(s)) for s in ("s3", "gs")])
def test_a_run_is_trained_from_a_bucket_by_the_real_protocol(scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("HGA_FLAX_CACHE", str(tmp_path / "cache"))
    with buckets.serve(scheme):
        address = f"{scheme}://bucket/data"
        put_digits(address)
        run = (*TINY, "--config.training.steps=8", "--config.evaluation.every_epochs=1")
        there = commands.run(*run, f"--config.data.dir={address}", f"--workdir={tmp_path / 'there'}")
        assert there.returncode == 0 and f"copying {address}/digits/1.0.0" in there.stderr, there.stderr
        here = commands.run(*run, f"--workdir={tmp_path / 'here'}")
        assert here.returncode == 0, here.stderr
        evaluated = commands.run("evaluate.py", f"--workdir={tmp_path / 'there'}", "--json")
        assert evaluated.returncode == 0 and "copying" not in evaluated.stderr, evaluated.stderr
        other = commands.run("evaluate.py", f"--workdir={tmp_path / 'here'}", "--json")
        assert evaluated.stdout.splitlines()[-1] == other.stdout.splitlines()[-1]
        pets = make_folder(tmp_path / "pets")
        packed = commands.run("-m", "hga_flax", "prepare", "folder", pets, f"--data-dir={address}")
        assert packed.returncode == 0 and f"{address}/pets/1.0.0" in packed.stdout, packed.stderr
        assert f"pets/1.0.0/{r.MARKER}" in Remote(address, "key").files()
