import io
import json
import pathlib
import pickle
import subprocess
import zipfile

import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.pretrained.torch_files import read_metadata, read_torch_file

FILES = pathlib.Path(__file__).parent.parent / "golden" / "torch"
BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
EXPECTED = {
    "whole": BASE,
    "transposed": BASE.T,
    "row": BASE[1],
    "half": np.array([1.5, -2.0], np.float16),
    "brain": np.array([0.5, 3.0]),
    "count": np.array(7),
    "double": np.array([[1 / 3]]),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.array([4.0, 5.0], np.float32),
}


@pytest.mark.parametrize("name", ["state_zip.pth", "checkpoint_legacy.pth", "state.safetensors"])
def test_reads_what_pytorch_writes(name):
    tensors = read_torch_file(FILES / name)
    expected = {key: value for key, value in EXPECTED.items() if key != "empty" or name.endswith(".pth")}
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key].astype(value.dtype), value)
        if key != "brain":
            assert tensors[key].dtype == value.dtype


def test_reads_a_modules_state_dict():
    assert read_torch_file(FILES / "module_zip.pth")["running_var"].tolist() == [1, 1]


def test_refuses_a_pickled_module():
    message = r"a whole pickled network \(torch\.nn\.modules\.batchnorm\.BatchNorm2d\), .* save only the weights: "
    with pytest.raises(UserError, match=message):
        read_torch_file(FILES / "whole_module.pth")


class Malicious:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def write_zip(path: pathlib.Path, program: bytes, **storages: bytes) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("function", [subprocess.call, eval, __import__, getattr, open, io.open_code])
def test_nothing_in_a_pickle_is_called(tmp_path, layout, function):
    trace = tmp_path / "trace"
    program = pickle.dumps({"weight": Malicious(function, f"touch {trace}")})
    path = tmp_path / "weights.pth"
    if layout == "zip":
        write_zip(path, program)
    else:
        path.write_bytes(program)
    with pytest.raises(UserError, match=r"it holds no tensors; it has weight \("):
        read_torch_file(path)
    assert not trace.exists()


def protocol0(text: str) -> bytes:
    return text.encode()


# The storage ('storage', torch.FloatStorage, '0', 'cpu', 4) on the stack, as a persistent id.
STORAGE = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
TENSOR = "(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n(I{rows}\nt(I{stride}\nttRs."


def test_a_handwritten_pickle_is_read(tmp_path):
    program = protocol0(TENSOR.format(storage=STORAGE, offset=1, rows=3, stride=1))
    path = write_zip(tmp_path / "w.pth", program, **{"0": np.arange(4, dtype="<f4").tobytes()})
    assert read_torch_file(path)["w"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("offset", "rows", "stride"), [(2, 3, 1), (0, 2, 4), (-1, 2, 1), (0, -2, 1), (0, 2, -1), (0, 1_000_000, 0)]
)
def test_a_tensor_cannot_reach_outside_its_storage(tmp_path, offset, rows, stride):
    program = protocol0(TENSOR.format(storage=STORAGE, offset=offset, rows=rows, stride=stride))
    path = write_zip(tmp_path / "w.pth", program, **{"0": bytes(16)})
    with pytest.raises(UserError, match=r"past the end of its storage|malformed"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "program",
    [
        # BUILD on an admitted name tries to set its attributes; calling a storage type; a tensor of no storage.
        "(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n(dS'name'\nS'x'\nsbs.",
        "(dS'w'\nctorch\nFloatStorage\n(I4\ntRs.",
        "(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n(I1\nI0\n(t(ttRs.",
        "(dS'w'\n(S'module'\nI1\ntQs.",
        "(I1\nI2\nt.",
        "(d.",
    ],
)
def test_other_uses_of_admitted_names_are_refused(tmp_path, program):
    with pytest.raises(UserError, match="cannot read weights"):
        read_torch_file(write_zip(tmp_path / "w.pth", protocol0(program)))


def test_damaged_and_missing_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_torch_file(tmp_path / "none.pth")
    for name in ("state_zip.pth", "checkpoint_legacy.pth", "state.safetensors"):
        whole = (FILES / name).read_bytes()
        path = tmp_path / name
        for length in (0, 3, len(whole) // 2, len(whole) - 4):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match="cannot read weights"):
                read_torch_file(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32"},
    ],
)
def test_safetensors_entries_must_fit_the_file(tmp_path, entry):
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="cannot read weights"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"w": [1]}',
        '{"w": {"dtype": "F32"}}',
        '{"w": {"dtype": "F32", "shape": null, "data_offsets": [0, 8]}}',
        '{"w": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
        '{"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
        '{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        '{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}',
    ],
)
def test_a_safetensors_header_of_another_form_is_said_to_be_damaged(tmp_path, text):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(8))
    message = r"cut short or damaged; fetch it again \(its header does not say where tensor 'w' is\)$"
    with pytest.raises(UserError, match=message):
        read_torch_file(path)


@pytest.mark.parametrize("header", [b'{"w":', b'{"\xff": 1}', b"{}}", b'{"w":' + b"[" * 100_000])
def test_a_safetensors_header_that_is_not_json_is_said_to_be_damaged(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for read in (read_torch_file, read_metadata):
        with pytest.raises(UserError, match=r"cut short or damaged; fetch it again \(its header is not JSON\)$"):
            read(path)
    path.write_bytes(b"\xff\xff\0\0\0\0\0\0" + header)
    if len(header) < 0xFFFF:
        with pytest.raises(UserError, match="its header does not end"):
            read_metadata(path)
