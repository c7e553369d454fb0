"""Nothing that is read is run, and nothing is written but where it belongs."""

import contextlib
import json
import os
import pathlib
import pickle
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest

from hga_flax.config.loading import parse_options
from hga_flax.data import packing
from hga_flax.data.arrays import read_npz
from hga_flax.data.folder import FolderSource, class_names
from hga_flax.data.sources import dataset_info
from hga_flax.errors import UserError
from hga_flax.images.bad_images import BadImage
from hga_flax.images.decoding import decode
from hga_flax.pretrained.torch_files import read_torch_file
from hga_flax.runs import workdir as files
from hga_flax.training.restore import restore_workdir
from hga_flax.training.trainer import train
from tests import commands
from tests.training import tiny

# What a file could only cause by being run as a program. Python reports these before they happen.
RUNNING = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}
_heard: list[str] | None = None


def _listen(event, arguments):
    if _heard is not None and event in RUNNING:
        _heard.append(f"{event}{arguments}")


sys.addaudithook(_listen)  # it cannot be taken away again, only told to be quiet


@contextlib.contextmanager
def nothing_runs(trace):
    """Fails where something was run, or left `trace` behind."""
    global _heard
    _heard = []
    try:
        yield
        assert _heard == [] and not trace.exists()
    finally:
        _heard = None


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "it-was-run"


def test_the_watch_sees_a_pickle_run(trace):
    with pytest.raises(AssertionError), nothing_runs(trace):
        pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(tiny.config(training__steps=1), str(folder))
    return folder


@pytest.mark.medium
def test_reading_a_workdir_unpickles_nothing(run, trace):
    with nothing_runs(trace):
        assert restore_workdir(str(run), "latest").step == 1


@pytest.mark.medium
@pytest.mark.parametrize(
    "names",
    [{"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"}, pytest.param(None, marks=pytest.mark.slow, id="all")],
)
def test_a_pickle_in_the_place_of_any_file_of_a_workdir_is_not_run(names, run, trace, tmp_path):
    everything = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    # One of several alike is enough: data files of arrays, event files.
    kinds = {(path.parent, path.suffix, path.name[:4]): path for path in everything}.values()
    assert {"config.json", "dataset.json", "_METADATA", "manifest.ocdbt"} <= {path.name for path in kinds}
    for path in (path for path in kinds if names is None or path.name in names):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        (copy / path).write_bytes(pickle.dumps(Malicious(trace)))
        # What the user is told of damage is test_checkpoints.py's matter.
        with nothing_runs(trace), contextlib.suppress(Exception):
            restore_workdir(str(copy), "latest")
        shutil.rmtree(copy)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["config.json", "dataset.json"])
def test_a_file_that_is_no_text_is_one_line(run, name, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        restore_workdir(str(tmp_path / "copy"))


@pytest.mark.medium
@pytest.mark.parametrize(
    "program",
    ["__import__('os').system('touch {}')", "open('{}', 'w')", "[open('{}', 'w') for _ in 'x']", "f'{{open(\"{}\")}}'"],
)
def test_a_program_in_a_configuration_is_not_run(program, run, trace, tmp_path):
    program = program.format(trace)
    with nothing_runs(trace), pytest.raises(UserError, match="write keyword arguments"):
        parse_options(f"features={program}", "model.options")
    config = json.loads((run / "config.json").read_text())
    for group, key in (("model", "options"), ("model", "name"), ("data", "eval_split"), ("data", "name")):
        changed = {**config, group: {**config[group], key: f"features={program}" if key == "options" else program}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        shutil.copy(run / "dataset.json", tmp_path)
        with nothing_runs(trace), pytest.raises(UserError):
            restore_workdir(str(tmp_path))


def test_weights_and_arrays_with_a_program_in_them_are_not_run(trace, tmp_path):
    weights, arrays = tmp_path / "w.pth", tmp_path / "a.npz"
    weights.write_bytes(pickle.dumps({"weight": Malicious(trace)}))
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(arrays, x_train=images, y_train=np.array([Malicious(trace)] * 2, dtype=object))
    with nothing_runs(trace):
        with pytest.raises(UserError, match=r"it holds no tensors; it has weight \((posix|nt)\.system\)"):
            read_torch_file(weights)
        with pytest.raises(UserError, match=r"cannot be read as \.npz: it holds Python objects"):
            read_npz(arrays)


HOSTILE = ("os system", "posix system", "builtins eval", "builtins exec", "__builtin__ getattr", "builtins __import__",
           "subprocess Popen", "subprocess check_output", "importlib import_module", "runpy run_path", "pty spawn",
           "torch.hub load", "torch load", "torch._utils _import_dotted_name", "pickle loads", "shutil rmtree",
           "torch.serialization load", "hga_flax.errors run_main", "pathlib Path.touch")  # fmt: skip


def hostile_pickles(module, name, trace):
    """Yields pickles that have a function called, as each opcode that can would do it."""
    function, arguments = f"c{module}\n{name}\n", f"(S'touch {trace}'\nt"
    named = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93"  # STACK_GLOBAL
    dictionary = "(dS'w'\n{}s."
    yield dictionary.format(f"{function}{arguments}R")
    yield dictionary.format(f"{function}{arguments}\x81")  # NEWOBJ
    yield dictionary.format(f"{function}{arguments}(d\x92")  # NEWOBJ_EX
    yield dictionary.format(f"(S'touch {trace}'\ni{module}\n{name}\n")  # INST
    yield dictionary.format(f"({function}S'touch {trace}'\no")  # OBJ
    yield dictionary.format(f"{function}(dS'x'\nI1\nsb")  # BUILD of the name itself
    yield dictionary.format(f"{function}(tR(dS'__setstate__'\n{function}sb(dS'x'\nI1\nsb")  # and of what it made
    yield dictionary.format(f"{function}(N(dS'__call__'\n{function}stb")  # by the state of slots
    yield dictionary.format(f"{function}{arguments}R{arguments}R")  # what it returned
    yield dictionary.format(f"ccollections\nOrderedDict\n(tR({function}(dS'items'\n{function}sb")
    yield named + f"({arguments[1:]}R."
    yield f"ctorch._utils\n_rebuild_tensor_v2\n({function}{arguments}RI0\n(t(ttR."
    yield f"ctorch._tensor\n_rebuild_from_type_v2\n({function}N{arguments}NtR."
    yield f"(S'storage'\n{function}S'0'\nS'cpu'\nI1\ntQ."


@pytest.mark.parametrize("layout", ["zip", "plain", "legacy"])
@pytest.mark.parametrize("named", HOSTILE)
def test_no_opcode_of_a_pickle_calls_what_it_names(named, layout, trace, tmp_path):
    module, name = named.split()
    weights = tmp_path / "w.pth"
    before = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    for program in hostile_pickles(module, name, trace):
        program = program.encode("latin1")
        if layout == "zip":
            with zipfile.ZipFile(weights, "w") as archive:
                archive.writestr("archive/data.pkl", program)
        else:
            weights.write_bytes(b"".join([*(before if layout == "legacy" else []), program]))
        with nothing_runs(trace), pytest.raises(UserError, match="cannot read weights"):
            read_torch_file(weights)


@pytest.mark.parametrize("reduction", [1, 8])
def test_an_image_that_is_a_program_is_a_bad_image(trace, reduction):
    programs = [pickle.dumps(Malicious(trace)), f"#!/bin/sh\ntouch {trace}".encode(), b"PK\x03\x04" + bytes(40)]
    programs += [b"\xff\xd8\xff\xe0" + pickle.dumps(Malicious(trace)), b"<svg onload='x()'/>", b"\x7fELF" + bytes(60)]
    with nothing_runs(trace):
        for program in programs:
            with pytest.raises(BadImage):
                decode(program, 3, reduction)


def test_a_leftover_that_points_elsewhere_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    data = tmp_path / "data"
    (data / "mine").mkdir(parents=True)
    (data / "mine" / ".preparing-x").symlink_to(outside)
    (data / "mine" / "incomplete.y").symlink_to(outside)
    with packing.locked(data, "mine"):
        pass
    assert (outside / "kept").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc/x", "..", "", "a\nb", "digits"])
def test_a_packed_data_set_cannot_be_named_out_of_its_folder(name):
    with pytest.raises(UserError, match="--name="):
        packing.check_name(name)


@pytest.mark.parametrize("name", ["a\nb", " a", "a\x1b[2J"])
def test_a_class_that_would_break_the_list_of_names_is_refused(name, tmp_path):
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "train", ignore_errors=True)
        (tmp_path / split / name).mkdir(parents=True)
        with pytest.raises(UserError, match=f"^{tmp_path / split}: .* cannot name a class"):
            class_names(tmp_path)


def test_links_in_a_folder_of_images_are_read_and_never_written(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("no image")
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "0.jpg").symlink_to(secret)
    record = FolderSource(tmp_path / "images", "train")[0]
    with pytest.raises(BadImage):
        decode(record["image"], 3)
    assert secret.read_text() == "no image"


# Runs commands in one process and prints every path that Python opens for writing, makes, moves or removes.
WATCHED = """
import json, os, runpy, sys
written = set()
def listen(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        mode, flags = arguments[1], arguments[2]
        if (mode and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(os.path.abspath(os.fsdecode(arguments[0])))
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        # Relative to an open folder, where one is given: shutil.rmtree goes by these.
        at = arguments[-1] if isinstance(arguments[-1], int) and arguments[-1] >= 0 else None
        folder = os.readlink(f"/proc/self/fd/{at}") if at is not None else os.getcwd()
        written.add(os.path.join(folder, os.fsdecode(arguments[0])))
    elif event in ("os.rename", "os.symlink", "os.link", "os.truncate"):
        paths = arguments[:1] if event == "os.truncate" else arguments[:2]
        written.update(os.path.abspath(os.fsdecode(p)) for p in paths if isinstance(p, (str, bytes)))
    elif event in ("socket.connect", "subprocess.Popen", "os.system"):
        written.add(f"{event} {arguments[1:2]}")
sys.addaudithook(listen)
for command in json.loads(sys.argv[1]):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
print("WRITTEN " + json.dumps(sorted(written)))
"""


@pytest.mark.medium
def test_training_and_evaluation_write_to_workdir_data_and_cache_alone(tmp_path):
    there = types.SimpleNamespace(**{name: tmp_path / name for name in ("home", "tmp", "here", "run", "data")})
    for folder in (there.home, there.tmp, there.here):
        folder.mkdir()
    cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    root, workdir = commands.ROOT, f"--workdir={there.run}"
    train_command = [
        str(root / "train.py"), f"--config={root / 'configs' / 'digits.py'}", workdir,
        "--config.model.name=cifar_resnet8",
        "--config.data.image_size=8", "--config.training.batch_size=32", "--config.training.steps=1",
        f"--config.data.dir={there.data}", f"--config.training.compilation_cache={cache}",
    ]  # fmt: skip
    environment = commands.environment() | {"HOME": str(there.home), "TMPDIR": str(there.tmp)}
    environment |= {"PYTHONPATH": f"{root}:{commands.BLOCK}", "PYTHONDONTWRITEBYTECODE": "1"}
    evaluate_command = [str(root / "evaluate.py"), workdir]
    for name in ("TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(name)
    result = commands.subprocess.run(
        commands.command("-c", WATCHED, json.dumps([train_command, evaluate_command])),
        cwd=there.here, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = json.loads(result.stdout.splitlines()[-1].removeprefix("WRITTEN "))
    # Python's tempfile tries with a file whether TMPDIR can be written to; below, nothing may be left there.
    allowed = [there.run, there.data, cache, there.tmp]
    outside = [p for p in map(pathlib.Path, written) if not any(p.is_relative_to(folder) for folder in allowed)]
    assert set(outside) <= {pathlib.Path(os.devnull)}
    assert any(p.startswith(str(there.run)) for p in written)  # the watch sees
    # And what no Python code wrote: native libraries.
    for folder in (there.home, there.tmp, there.here):
        assert list(folder.rglob("*")) == [], folder
    assert {p.name for p in tmp_path.iterdir()} == {"home", "tmp", "here", "run", "data"}


def test_a_data_set_that_is_not_prepared_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dataset_info("imagenet2012", str(tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []


def test_read_config_is_never_evaluated(tmp_path):
    (tmp_path / "config.json").write_text("__import__('os').system('true')")
    with pytest.raises(UserError, match="not a configuration"):
        files.read_config(tmp_path)
