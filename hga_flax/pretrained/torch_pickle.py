"""Unpickles files of `torch.save` without PyTorch and without running anything that the pickle names.

A pickle can call any function that it names. Here a name either builds tensors or becomes a stand-in, a class
of ours that stores what the pickle passes to it and does nothing. So the options, schedules and metrics that
training programs save with the weights are skipped, and none of their code is imported or called.
The names that build tensors are from torch/_utils.py, torch/storage.py and numpy/_core/multiarray.py.
"""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

QUANTISED = re.compile(r"\bQ\w+Storage$")
REPEATED = 65536  # maximum number of values of a tensor that repeats a shorter storage with stride 0
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {  # PyTorch's names
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


class Storage:
    """The flat array behind one or more tensors; its bytes are read on first use.

    Attributes:
        dtype: dtype of the values.
        size: number of values.
        read: function that returns the bytes; set by the reader of the file's layout.
    """

    __slots__ = ("_data", "dtype", "read", "size")

    def __init__(self, dtype: np.dtype, size: int, read: Callable[[], bytes] | None = None) -> None:
        self.dtype, self.size, self.read, self._data = dtype, size, read, None

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a storage has no state to set")

    def data(self) -> np.ndarray:
        """Returns the values.

        Raises:
            ValueError: the file has fewer bytes than the storage needs.
        """
        if self._data is None:
            raw = self.read() if self.read else b""
            if len(raw) < self.size * self.dtype.itemsize:
                raise ValueError("the file is cut short: a storage has fewer bytes than its tensors say")
            self._data = np.frombuffer(raw, self.dtype, count=self.size)
        return self._data


class Tensor:
    """A tensor as the file describes it: a strided view of a storage.

    Attributes:
        shape: shape with PyTorch's order of axes.
    """

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(
        self, storage: Storage, offset: int, shape: tuple, strides: tuple, dtype: np.dtype | None = None
    ) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides
        self.dtype = dtype or storage.dtype

    def __setstate__(self, state: Any) -> None:
        """Ignores attributes of the tensor, which do not affect its values."""

    def array(self) -> np.ndarray:
        """Returns a copy of the view, after checking that it is inside the storage.

        Raises:
            ValueError: the view is not, or its shape or strides are malformed.
        """
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor's shape or strides are malformed")
        count = math.prod(self.shape)
        if count == 0:
            return np.zeros(self.shape, self.dtype)
        data = self.storage.data()
        if data.dtype != self.dtype:
            data = data.view(self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if last >= data.size or count > max(data.size, REPEATED):
            raise ValueError("a tensor reaches past the end of its storage")
        strides = tuple(s * data.itemsize for s in self.strides)
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, strides, writeable=False).copy()


class StandIn:
    """Replaces an object of an unknown class: stores what the pickle passes to it and does nothing.

    Attributes:
        origin: name of the class that it replaces, such as "argparse.Namespace".
        items: entries that the pickle set by key, as for a dictionary subclass.
        state: the argument of `__setstate__`.
    """

    __slots__ = ("arguments", "items", "state")
    origin = ""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "StandIn":
        self = object.__new__(cls)
        self.arguments, self.items, self.state = arguments, {}, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Stores an entry, as for a list subclass."""
        self.items[len(self.items)] = value

    add = append

    @property
    def is_module(self) -> bool:
        """Whether it replaces a whole `torch.nn.Module`."""
        return isinstance(self.state, dict) and {"_modules", "_parameters"} <= set(self.state)


class _Dtype:
    """A `numpy.dtype` in a pickle."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype:
        dtype = np.dtype(self.code)
        if dtype.hasobject or dtype.names or dtype.subdtype:
            raise pickle.UnpicklingError("it holds an array of objects")
        return dtype.newbyteorder(self.order if self.order in "<>" else "=")


class _NumpyArray(Tensor):
    """A `numpy.ndarray` in a pickle; Detectron2 and older programs write weights this way."""

    __slots__ = ()

    def __init__(self, *_: Any) -> None:
        super().__init__(Storage(np.dtype("u1"), 0), 0, (0,), (0,))

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, raw = state[-4:]  # a version number may precede them
        if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray, str)):
            raise pickle.UnpicklingError("it holds an array of objects")
        raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        self.shape, self.dtype = tuple(shape), dtype.dtype()
        self.storage = Storage(self.dtype, len(raw) // self.dtype.itemsize, lambda: raw)
        self.strides = contiguous(self.shape[::-1])[::-1] if fortran else contiguous(self.shape)


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Tensor:
    """Rebuilds a `numpy.ndarray` from a pickle of protocol 5."""
    array = _NumpyArray()
    array.__setstate__((shape, dtype, order == "F", raw))
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Rebuilds bytes from a pickle that Python 3 wrote in a protocol for Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("it holds a string of an unknown kind")
    return text.encode("latin1")


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides of a C-contiguous array, in values."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class _Name:
    """Represents a name in the pickle that is not a class: a storage type, or a function that rebuilds a tensor.

    It has no `__dict__`, and its `__setstate__` raises, so a pickle can do nothing but call it.
    """

    __slots__ = ("_call", "name")

    def __init__(self, name: str, call: Any = None) -> None:
        self.name, self._call = name, call

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise pickle.UnpicklingError(f"{self.name} must not be called")
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{self.name} has no state to set")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    # The remaining arguments (requires_grad, backward hooks, metadata) do not affect the values.
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("it holds a tensor without a storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """Rebuilds a tensor of a dtype without its own storage type: the storage is untyped, the tensor has the dtype."""
    tensor = _rebuild_tensor(storage, offset, shape, strides)
    name = getattr(dtype, "origin", "").removeprefix("torch.")
    if name not in DTYPES:
        raise pickle.UnpicklingError(f"it holds a tensor of type {name or dtype}")
    tensor.dtype = DTYPES[name]
    return tensor


def _rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError("it holds a parameter without a tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """Rebuilds a subclass of Tensor, or a tensor with attributes."""
    if not isinstance(function, _Name):
        raise pickle.UnpicklingError("it holds a tensor of an unknown class")
    return function(*arguments)


def _load_from_bytes(raw: Any) -> Any:
    """Rebuilds a storage in a pickle that `pickle.dump` wrote: an embedded file of PyTorch's older layout."""
    return read_legacy(io.BytesIO(raw if isinstance(raw, bytes) else raw.encode("latin1")))


_ADMITTED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _Name("Size", tuple),
    ("torch._utils", "_rebuild_tensor"): _Name("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Name("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Name("_rebuild_tensor_v3", _rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Name("_rebuild_parameter", _rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Name("_rebuild_parameter_with_state", _rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Name("_rebuild_from_type_v2", _rebuild_from_type),
    ("torch.storage", "_load_from_bytes"): _Name("_load_from_bytes", _load_from_bytes),
    ("torch.storage", "UntypedStorage"): _Name("UntypedStorage"),
    ("numpy", "dtype"): _Name("dtype", _Dtype),
    ("numpy.core.multiarray", "_reconstruct"): _Name("_reconstruct", _NumpyArray),
    ("numpy._core.multiarray", "_reconstruct"): _Name("_reconstruct", _NumpyArray),
    ("numpy.core.numeric", "_frombuffer"): _Name("_frombuffer", _from_buffer),
    ("numpy._core.numeric", "_frombuffer"): _Name("_frombuffer", _from_buffer),
    ("_codecs", "encode"): _Name("encode", _encode),
} | {("torch", name): _Name(name) for name in STORAGES}


class Unpickler(pickle.Unpickler):
    """Unpickler that resolves only the names in `_ADMITTED`, replaces all others by a `StandIn`, and collects storages.

    Args:
        file: file positioned at the start of a pickle.
        storages: filled with the storages that the pickle refers to, by their keys in the file.
    """

    def __init__(self, file: BinaryIO, storages: dict[str, Storage]) -> None:
        super().__init__(file, encoding="latin1")  # some old files were written by Python 2
        self.storages = storages
        self._views: dict[tuple, Storage] = {}
        self._classes: dict[str, type[StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Resolves a name without importing anything."""
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        origin = f"{module}.{name}"
        if origin not in self._classes:
            self._classes[origin] = type("StandIn", (StandIn,), {"__slots__": (), "origin": origin})
        return self._classes[origin]

    def persistent_load(self, pid: Any) -> Any:
        """Returns the storage that a tensor refers to."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # old files store the source code of a module's class with it
        if isinstance(pid, tuple) and len(pid) > 1 and (kind := QUANTISED.search(getattr(pid[1], "origin", ""))):
            raise pickle.UnpicklingError(
                f"it holds quantised tensors ({kind[0]}); give the weights that the network was quantised from"
            )
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Name):
            raise pickle.UnpicklingError("it refers to something other than a storage")
        kind, key, size = pid[1].name, str(pid[2]), pid[4]
        if kind not in STORAGES:
            raise pickle.UnpicklingError("it holds a storage of an unknown kind")
        if type(size) is not int or size < 0:
            raise pickle.UnpicklingError("a storage has no valid size")
        storage = self.storages.setdefault(key, Storage(DTYPES[STORAGES[kind]], size))
        return self._view(storage, pid[5]) if len(pid) > 5 and pid[5] is not None else storage

    def _view(self, storage: Storage, view: Any) -> Storage:
        """Returns a slice of a storage; in old files several tensors may share one."""
        if not isinstance(view, tuple) or len(view) != 3 or any(type(n) is not int or n < 0 for n in view[1:]):
            raise pickle.UnpicklingError("a part of a storage is malformed")
        key, offset, size = view
        width = storage.dtype.itemsize

        def read() -> bytes:
            return storage.data()[offset : offset + size].tobytes()

        return self._views.setdefault((id(storage), str(key), offset, size * width), Storage(storage.dtype, size, read))


def read_legacy(file: BinaryIO) -> Any:
    """Reads the layout used before PyTorch 1.6 (a sequence of pickles, then the storages) or a plain pickle.

    Raises:
        ValueError: the file is damaged or truncated.
    """
    first = Unpickler(file, {}).load()
    if first != LEGACY_MAGIC or isinstance(first, (StandIn, Tensor)):
        return first  # a dictionary that pickle.dump wrote
    storages: dict[str, Storage] = {}
    version, system = (Unpickler(file, {}).load() for _ in range(2))
    if version != 1001:
        raise ValueError(f"it has version {version} of PyTorch's older layout, which is not known")
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("its data are big-endian, which is not read; save it on a little-endian machine")
    result = Unpickler(file, storages).load()
    keys = Unpickler(file, {}).load()
    if not isinstance(keys, list) or {str(key) for key in keys} != set(storages):
        raise ValueError("its list of storages does not fit its tensors")
    start = file.tell()
    end = file.seek(0, io.SEEK_END)
    for key in keys:
        storage = storages[str(key)]
        file.seek(start)
        size = int.from_bytes(file.read(8), "little", signed=True)
        length = size * storage.dtype.itemsize
        if start + 8 > end or (size >= 0 and start + 8 + length > end):
            raise ValueError("the file is cut short")
        if size != storage.size:
            raise ValueError("a storage differs in size from what its tensors say")
        storage.read = part(file, start + 8, length)
        start += 8 + length
    return result


def part(file: BinaryIO, start: int, length: int) -> Callable[[], bytes]:
    """Returns a function that reads `length` bytes of a file from offset `start`."""

    def read() -> bytes:
        file.seek(start)
        return file.read(length)

    return read
