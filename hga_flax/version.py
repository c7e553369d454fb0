"""The version, apart so that packaging reads it without importing JAX."""

import functools
import pathlib
import zlib

__version__ = "0.1.0"


@functools.cache
def version_of_code() -> str:
    """Returns the version with a checksum of the package's source files, which an edited copy does not share."""
    return f"{__version__} (code {checksum(pathlib.Path(__file__).parent)})"


def checksum(source: pathlib.Path) -> str:
    """Returns a checksum of a Python file, or of the names and contents of all in a folder, as 8 hexadecimal digits."""
    found = 0
    for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
        found = zlib.crc32(file.relative_to(source).as_posix().encode() + file.read_bytes(), found)
    return f"{found:08x}"
