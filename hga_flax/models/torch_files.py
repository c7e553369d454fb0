"""Reads PyTorch checkpoints into NumPy arrays, without PyTorch and without running what they hold.

`.pth` files are pickles, and a pickle can call any function it names. The reader here admits only
what builds a dictionary of tensors and refuses every other name before it is imported. Both layouts
of `torch.save` are read: the zip archive (PyTorch 1.6 and later, `data.pkl` beside one raw file per
storage) and the older sequence of pickles that many released files still have. The layouts:
https://docs.pytorch.org/docs/stable/notes/serialization.html, torch/serialization.py.
`.safetensors`: https://huggingface.co/docs/safetensors (a JSON header, then raw data).
"""

import io
import json
import math
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from hga_flax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_SAFETENSORS = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Where training programs keep the state dict inside a checkpoint, in the order that timm looks.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


class _Storage:
    """The flat array behind one or more tensors; filled in later where the file keeps data last."""

    __slots__ = ("data", "dtype", "size")

    def __init__(self, dtype: np.dtype, size: int) -> None:
        self.dtype, self.size, self.data = dtype, size, None


class _Tensor:
    """A tensor as the pickle describes it: a window of a storage."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        """Returns a copy of the window, after checking that it lies inside the storage."""
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor's shape or strides are malformed")
        data = self.storage.data
        count = math.prod(self.shape)
        if count == 0:
            return np.zeros(self.shape, self.storage.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if data is None or last >= data.size or count > data.size:
            raise ValueError("a tensor reaches past the end of its storage")
        strides = tuple(s * data.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, strides, writeable=False).copy()


class _Name:
    """Stands for a name in the pickle that is no class: a storage type, or a function that rebuilds a tensor.

    Without `__dict__` and with a `__setstate__` that refuses, a pickle can do nothing to it but call it.
    """

    __slots__ = ("_call", "name")

    def __init__(self, name: str, call: Any = None) -> None:
        self.name, self._call = name, call

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise pickle.UnpicklingError(f"{self.name} is not to be called")
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{self.name} has no state to set")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    # What follows (requires_grad, backward hooks, metadata) does not concern the values.
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return data


_ADMITTED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Name("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Name("_rebuild_parameter", _rebuild_parameter),
} | {("torch", name): _Name(name) for name in _STORAGES}


class _Unpickler(pickle.Unpickler):
    """Admits the names of `_ADMITTED` and nothing else; hands storages out of `storages`."""

    def __init__(self, file: BinaryIO, storages: dict[str, _Storage]) -> None:
        super().__init__(file, encoding="latin1")  # some old files were written by Python 2
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a dictionary of tensors")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError("it refers to something other than a storage")
        kind, key, size = pid[1].name, str(pid[2]), pid[4]
        if kind not in _STORAGES or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("it holds a storage of an unknown kind")
        if type(size) is not int or size < 0:
            raise pickle.UnpicklingError("a storage has no size")
        return self.storages.setdefault(key, _Storage(_STORAGES[kind], size))


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the archive has no one data.pkl; TorchScript and other archives are not read")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in archive.namelist():
            raise ValueError("it is a TorchScript program, not a state dict")
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise ValueError("its data are big-endian")
        storages: dict[str, _Storage] = {}
        result = _Unpickler(io.BytesIO(archive.read(pickles[0])), storages).load()
        for key, storage in storages.items():
            raw = archive.read(f"{root}data/{key}")
            storage.data = np.frombuffer(raw, storage.dtype, count=storage.size)
    return result


def _read_legacy(file: BinaryIO) -> Any:
    storages: dict[str, _Storage] = {}
    magic, version, system = (_Unpickler(file, {}).load() for _ in range(3))
    if magic != _LEGACY_MAGIC or version != 1001:
        raise ValueError("it is not a PyTorch file")
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("its data are big-endian")
    result = _Unpickler(file, storages).load()
    keys = _Unpickler(file, {}).load()
    if not isinstance(keys, list) or {str(key) for key in keys} != set(storages):
        raise ValueError("its list of storages does not fit its tensors")
    for key in keys:
        storage = storages[str(key)]
        size = int.from_bytes(file.read(8), "little", signed=True)
        if size != storage.size:
            raise ValueError("a storage has another size than its tensors say")
        storage.data = np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype, count=size)
    return result


def _read_safetensors(file: BinaryIO) -> dict[str, np.ndarray]:
    raw = file.read()
    length = int.from_bytes(raw[:8], "little")
    if length > len(raw) - 8:
        raise ValueError("its header is cut short")
    header = json.loads(raw[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, stop) = _SAFETENSORS.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"tensor '{name}' has dtype {entry['dtype']}, which is not read")
        count = math.prod(shape)
        if min([start, *shape]) < 0 or stop - start != count * dtype.itemsize or 8 + length + stop > len(raw):
            raise ValueError(f"tensor '{name}' does not fit its place in the file")
        tensors[name] = np.frombuffer(raw, dtype, count, offset=8 + length + start).reshape(shape)
    return tensors


def _state_dict(loaded: Any) -> dict[str, np.ndarray]:
    """Finds the names and tensors in what a `.pth` file holds; other entries, such as an epoch, are left out."""
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict):
        raise ValueError("it holds no dictionary of tensors")
    tensors = {str(name): value.array() for name, value in loaded.items() if isinstance(value, _Tensor)}
    if not tensors:
        raise ValueError("it holds no dictionary of tensors")
    if all(name.startswith("module.") for name in tensors):  # saved from DataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def read_torch_file(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a state dict from a `.safetensors` or a `.pth` (`.pt`, `.bin`, `.tar`) file.

    Nothing that a pickle asks for is imported or called, see the module's head.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something other than tensors.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _read_safetensors(file)
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _state_dict(_read_zip(file) if is_zip else _read_legacy(file))
    except OSError as error:
        raise UserError(f"cannot read weights {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"cannot read weights {path}: {error or type(error).__name__}") from None
