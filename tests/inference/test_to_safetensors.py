import json

import ml_dtypes
import numpy as np
import pytest

from hga_flax.inference.to_safetensors import to_safetensors
from hga_flax.pretrained.torch_files import read_torch_file

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "scalar": np.array(2.5, np.float64),
    "brain": np.array([0.5, 3.0], ml_dtypes.bfloat16),
    "count": np.array([7], np.int64),
    "seen": np.array([7, 9], np.uint32),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(to_safetensors(TENSORS, {}))
    found = read_torch_file(path)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()


def test_the_data_are_aligned_and_the_metadata_kept():
    raw = to_safetensors(TENSORS, {"format": "pt", "class_names": '["a", "\u00e9"]'})
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt", "class_names": '["a", "\u00e9"]'}


def test_the_formats_own_library_reads_it(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "w.safetensors"
    plain = {name: tensor for name, tensor in TENSORS.items() if name != "brain"}  # NumPy has no bfloat16
    path.write_bytes(to_safetensors(plain, {"format": "pt"}))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(plain)
        for name, tensor in plain.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)
