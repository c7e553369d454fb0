"""Reads PyTorch weights files into NumPy arrays, without PyTorch and without executing code in them.

The layout is recognised by the file's content, not its extension. Both layouts of `torch.save` are supported: the zip
archive (PyTorch 1.6 and later, `data.pkl` next to one raw file per storage) and the older sequence of pickles, which
many released files still use. The layouts: https://docs.pytorch.org/docs/stable/notes/serialization.html,
torch/serialization.py. `.safetensors`: https://huggingface.co/docs/safetensors (a JSON header, then raw data).
"""

import contextlib
import io
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from hga_flax.errors import UserError
from hga_flax.pretrained.file_kinds import weights_layout, zip_kind
from hga_flax.pretrained.torch_contents import Contents
from hga_flax.pretrained.torch_pickle import Storage, Tensor, Unpickler, contiguous, part, read_legacy

SAFETENSORS = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CUT = "the file is cut short or damaged; fetch it again"


def _read_zip(file: BinaryIO) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise ValueError(f"{_CUT} (the end of the zip archive is missing)") from None
    names = archive.namelist()
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(zip_kind(names))
    root = pickles[0].removesuffix("data.pkl")
    if root + "constants.pkl" in names:
        raise ValueError(
            "it is a TorchScript program, not a state dict; save its weights: torch.save(torch.jit.load(FILE)"
            ".state_dict(), NEW)"
        )
    if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
        raise ValueError("its data are big-endian, which is not read; save it on a little-endian machine")
    storages: dict[str, Storage] = {}
    result = Unpickler(io.BytesIO(archive.read(pickles[0])), storages).load()
    for key, storage in storages.items():
        member, length = f"{root}data/{key}", storage.size * storage.dtype.itemsize
        if member not in names:
            raise ValueError(f"{_CUT} ({member} is missing)")
        storage.read = _member(archive, member, length)
    return result


def _member(archive: zipfile.ZipFile, name: str, length: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with archive.open(name) as file:
            return file.read(length)

    return read


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Returns the header of a safetensors file, and the bytes at which the data begin and end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("the file is cut short: its header does not end")
    try:
        return dict(json.loads(file.read(length))), 8 + length, size
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{_CUT} (its header is not JSON)") from None


def _place(name: str, entry: Any) -> tuple[str, list[int], int, int]:
    """Returns a tensor's dtype, shape, first byte and the one after its last, from a safetensors header."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], list(entry["shape"]), entry["data_offsets"]
        if not isinstance(dtype, str) or any(type(number) is not int for number in (start, stop, *shape)):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{_CUT} (its header does not say where tensor {name!r} is)") from None
    return dtype, shape, start, stop


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    header, data, size = _read_header(file)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape, start, stop = _place(name, entry)
        dtype = SAFETENSORS.get(kind)
        if dtype is None:
            raise ValueError(f"tensor '{name}' has dtype {kind}, which is not supported")
        count = math.prod(shape)
        if min([start, *shape]) < 0 or stop - start != count * dtype.itemsize:
            raise ValueError(f"tensor '{name}' does not fit its place in the file")
        if data + stop > size:
            raise ValueError(f"the file is cut short: tensor '{name}' ends after it")
        storage = Storage(dtype, count, part(file, data + start, stop - start))
        tensors[name] = Tensor(storage, 0, tuple(shape), contiguous(shape))
    return tensors


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Returns the metadata of a file of weights; {} if it has none, as files have that are not in safetensors format.

    Raises:
        UserError: the file cannot be read.
    """
    with _named(path), path.open("rb") as file:
        if weights_layout(path) != "safetensors":
            return {}
        metadata = _read_header(file)[0].get("__metadata__")
        return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


_READERS = {"zip": _read_zip, "pickle": read_legacy, "safetensors": _read_safetensors}


@contextlib.contextmanager
def _named(path: pathlib.Path, kinds: tuple[type[Exception], ...] = (OSError, ValueError)) -> Iterator[None]:
    """Converts errors of these kinds to a one-line UserError that names the file."""
    try:
        yield
    except EOFError:
        raise UserError(f"cannot read weights {path}: {_CUT} (its pickle does not end)") from None
    except kinds as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if "truncated" in reason or "ran out of input" in reason.lower() or "CRC-32" in reason:
            reason = f"{_CUT} ({reason})"
        raise UserError(f"cannot read weights {path}: {reason}") from None


def check_weights_file(path: str | pathlib.Path) -> None:
    """Checks from a file's first bytes that it holds weights.

    Raises:
        UserError: it does not; the message says what the file is.
    """
    with _named(pathlib.Path(path)):
        weights_layout(pathlib.Path(path))


@contextlib.contextmanager
def open_weights(path: str | pathlib.Path) -> Iterator[Contents]:
    """Opens a weights file with any extension; tensors are read lazily.

    Nothing that a pickle names is imported or called (torch_pickle.py).

    Raises:
        UserError: the file cannot be read, is damaged or has no tensors, or a ValueError was raised within the context.
    """
    path = pathlib.Path(path)
    with _named(path):
        layout = weights_layout(path)
        opened = path.open("rb")
    with opened as file:
        with _named(path, (Exception,)):  # a damaged pickle may raise anything
            contents = Contents(_READERS[layout](file))
        with _named(path, (OSError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error)):
            contents.check()
            yield contents


def read_torch_file(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the state dict of a file whose network is unknown: the one with the most tensors, preferring an average.

    Raises:
        UserError: see `open_weights`.
    """
    with open_weights(path) as contents:
        return contents.state_dict()
