"""Writes files as `torch.save` does, without PyTorch: pickles by hand, around arrays of NumPy."""

import collections
import dataclasses
import io
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "float64": "DoubleStorage"}


@dataclasses.dataclass(eq=False)
class Global:
    """A name in a pickle, which is not imported to write it."""

    module: str
    name: str


@dataclasses.dataclass(eq=False)
class Reduced:
    """What a pickle has made by a call of `function` (`new`: by NEWOBJ), and then given items and a state."""

    function: Any
    arguments: tuple = ()
    state: Any = None
    new: bool = False
    items: dict | None = None


@dataclasses.dataclass(eq=False)
class _Storage:
    key: str
    array: np.ndarray


class _Pickler(pickle._Pickler):
    """A pickler in which the above and arrays stand for what PyTorch would write."""

    def __init__(self, file: Any, rebuild: str, view: bool):
        super().__init__(file, protocol=2)
        self.storages: list[_Storage] = []
        self._rebuild, self._view = rebuild, view

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = Global("torch", STORAGES[value.array.dtype.name])
        size = value.array.size
        if self._view:  # a part of a storage that begins with one value more
            return ("storage", kind, value.key, "cpu", size + 1, (f"v{value.key}", 1, size))
        return ("storage", kind, value.key, "cpu", size, *([None] if self._rebuild == "_rebuild_tensor" else []))

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Global):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Reduced):
            self.save(value.function)
            self.save(value.arguments)
            self.write(b"\x81" if value.new else b"R")
            for key, entry in (value.items or {}).items():
                self.save(key)
                self.save(entry)
                self.write(b"s")
            if value.state is not None:
                self.save(value.state)
                self.write(b"b")
        elif isinstance(value, np.ndarray):
            storage = _Storage(str(len(self.storages)), np.ascontiguousarray(value).reshape(-1))
            self.storages.append(storage)
            strides = tuple(int(np.prod(value.shape[i + 1 :])) for i in range(value.ndim))
            more = () if self._rebuild == "_rebuild_tensor" else (False, collections.OrderedDict())
            arguments = (storage, 0, tuple(map(int, value.shape)), strides, *more)
            self.save(Reduced(Global("torch._utils", self._rebuild), arguments))
        else:
            super().save(value, save_persistent_id)


def _pickled(value: Any, rebuild: str = "_rebuild_tensor_v2", view: bool = False) -> tuple[bytes, list[_Storage]]:
    text = io.BytesIO()
    pickler = _Pickler(text, rebuild, view)
    pickler.dump(value)
    return text.getvalue(), pickler.storages


def save(value: Any, path: pathlib.Path) -> pathlib.Path:
    """Writes the zip archive of PyTorch 1.6 and later."""
    program, storages = _pickled(value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        for storage in storages:
            archive.writestr(f"archive/data/{storage.key}", storage.array.tobytes())
    return path


def save_legacy(value: Any, path: pathlib.Path, rebuild: str = "_rebuild_tensor_v2", view: bool = False):
    """Writes the sequence of pickles before it; `view` with each storage as a part of a longer one."""
    program, storages = _pickled(value, rebuild, view)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [program, pickle.dumps([storage.key for storage in storages], protocol=2)]
    for storage in storages:
        data = np.concatenate([storage.array[:1], storage.array]) if view else storage.array
        parts += [data.size.to_bytes(8, "little"), data.tobytes()]
    path.write_bytes(b"".join(parts))
    return path
