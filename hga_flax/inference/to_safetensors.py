"""Writes arrays as a `.safetensors` file (https://huggingface.co/docs/safetensors): a JSON header, then raw data."""

import json
from collections.abc import Mapping

import numpy as np

from hga_flax.pretrained.torch_files import SAFETENSORS

_NAMES = {dtype.name: name for name, dtype in SAFETENSORS.items()}
_ALIGNMENT = 8  # bytes; the data starts at a multiple of this, because readers memory-map it


def to_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of the file.

    Args:
        tensors: arrays by name.
        metadata: metadata for the header; PyTorch libraries require `format` to be "pt".

    Example:
        path.write_bytes(to_safetensors({"fc.bias": np.zeros(10, np.float32)}, {"format": "pt"}))
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    parts, start = [], 0
    for name, tensor in tensors.items():
        data = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).tobytes()
        offsets = [start, start + len(data)]
        header[name] = {"dtype": _NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(data)
        start += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
