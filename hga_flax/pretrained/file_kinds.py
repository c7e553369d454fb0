"""Identifies a file by its first bytes, regardless of its name: the layout of its weights, or another file type.

The signatures: https://docs.pytorch.org/docs/stable/notes/serialization.html,
https://huggingface.co/docs/safetensors, https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md,
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, and each format's own page.
"""

import os
import pathlib
import re
from collections.abc import Iterable

HEAD = 1024  # number of bytes to inspect
WEIGHTS = re.compile(r"\.(pth|pt|bin|th|ckpt|tar|pkl|safetensors)$", re.IGNORECASE)
WANTED = "give a file written by torch.save, or a .safetensors file"
PACKED = "unpack it first, and give the weights file in it"
_SHARD = re.compile(r"\D(\d{5})-of-(\d{5})\.")  # in the names of Hugging Face's files
MERGED = "save the network in one file first, as by save_pretrained(DIR, max_shard_size='1TB')"
_MAGIC = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the weights; fetch them with git lfs pull"),
    (b"\x1f\x8b", f"it is compressed with gzip; {PACKED}"),
    (b"BZh", f"it is compressed with bzip2; {PACKED}"),
    (b"\xfd7zXZ\x00", f"it is compressed with xz; {PACKED}"),
    (b"\x28\xb5\x2f\xfd", f"it is compressed with zstd; {PACKED}"),
    (b"7z\xbc\xaf\x27\x1c", f"it is a 7z archive; {PACKED}"),
    (b"Rar!", f"it is a RAR archive; {PACKED}"),
    (b"\x89HDF\r\n\x1a\n", f"it is an HDF5 file, as Keras writes for TensorFlow; {WANTED}"),
    (b"\x93NUMPY", f"it is a NumPy array; {WANTED}"),
    (b"GGUF", f"it is a GGUF file (llama.cpp); {WANTED}"),
    (b"%PDF", f"it is a PDF; {WANTED}"),
    (b"\xff\xd8\xff", f"it is a JPEG image; {WANTED}"),
    (b"\x89PNG", f"it is a PNG image; {WANTED}"),
    (b"\x08\x01\x12", f"it is a TensorFlow SavedModel; {WANTED}"),
)
# An ONNX protocol buffer starts with its version (field 1), then the producer, a domain or the graph (2 to 8).
_ONNX = re.compile(rb"\x08[\x03-\x20][\x12\x1a\x22\x28\x32\x3a\x42]")
_TEXT_PICKLE = re.compile(rb"\((dp?\d*|lp?\d*)\n|\(d[.(S]|[\]}]q|c[\w.]+\n[\w.]+\n")  # protocols 0 and 1 have no marker
_TENSORFLOW_INDEX = (0xDB4775248B80FB57).to_bytes(8, "little")  # the last 8 bytes


def weights_layout(path: pathlib.Path) -> str:
    """Returns the layout of a weights file: "zip", "pickle" or "safetensors".

    Raises:
        ValueError: the file is something else; the message says what it is and what to do.
        OSError: the file cannot be read.
    """
    if path.is_dir():
        raise ValueError(_folder(path))
    if (shard := _SHARD.search(path.name)) and int(shard[2]) > 1:
        raise ValueError(f"it is part {int(shard[1])} of {int(shard[2])} of the weights; {MERGED}")
    with path.open("rb") as file:
        head = file.read(HEAD)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if not head:
        raise ValueError("the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[0] == 0x80 and head[1:2] and head[1] <= 5:
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**30:
        return "safetensors"
    if head[257:262] == b"ustar":
        return _tar(path)
    for magic, message in _MAGIC:
        if head.startswith(magic):
            raise ValueError(message)
    if tail == _TENSORFLOW_INDEX:
        raise ValueError(f"it is the index of a TensorFlow checkpoint; {WANTED}")
    if _ONNX.match(head):
        raise ValueError(f"it is an ONNX model; {WANTED}")
    if _TEXT_PICKLE.match(head):
        return "pickle"
    raise ValueError(_unknown(head, size))


def _unknown(head: bytes, size: int) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64]
    if not head.strip():
        return f"the file holds only blanks; {WANTED}"
    if re.match(rb"<(!doctype|html|\?xml|head|body|!--)", start, re.IGNORECASE):
        return "it is a web page (HTML), not weights; the site sent a page instead of the file"
    if b'"weight_map"' in head:
        return f"it is the index of weights in several files; {MERGED}"
    if re.match(rb'[{\[]\s*["{\[\]}]', start):
        return f"it is a JSON file, not weights; {WANTED}"
    if head.isascii() and not re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        line = start.decode("ascii").splitlines()[0][:40]
        return f"it is a text file that starts with '{line}', not weights; {WANTED}"
    if size < 16:
        return f"the file is cut short: it has {size} bytes"
    if head[4:8] == b"TFL3":
        return f"it is a TensorFlow Lite model; {WANTED}"
    if re.match(rb"[\x81-\x8f].{0,3}(params|batch_stats|model|opt_state)", head, re.DOTALL):
        return f"it is a msgpack file, as Flax writes; {WANTED}"
    return f"it is not a known kind of weights file (it starts with the bytes {head[:8].hex(' ')}); {WANTED}"


def _tar(path: pathlib.Path) -> str:
    import tarfile

    try:
        with tarfile.open(path) as archive:
            names = archive.getnames()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"it is a damaged or incomplete tar archive: {error}") from error
    if {"storages", "tensors", "pickle"} <= set(names):
        raise ValueError(
            "it is a tar archive from PyTorch before 0.1.10, which is not supported; load it with a current PyTorch "
            "and save its state dict again"
        )
    raise ValueError(f"it is a tar archive with {listed(names)}; {PACKED}")


def _folder(path: pathlib.Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    weights = [name for name in names if WEIGHTS.search(name)]
    if weights:
        return f"it is a folder; name a file in it: {listed(weights)}"
    if "saved_model.pb" in names:
        return f"it is the folder of a TensorFlow SavedModel; {WANTED}"
    return f"it is a folder with {listed(names)}; {WANTED}" if names else "it is an empty folder"


def zip_kind(names: Iterable[str]) -> str:
    """Describes a zip archive that does not hold exactly one PyTorch pickle, and says what to do."""
    names = [name for name in names if not name.endswith("/")]
    weights = [name for name in names if WEIGHTS.search(name)]
    if any("serialized_exported_program" in name or name.endswith("archive_format") for name in names):
        return "it is a program written by torch.export; save the network's state dict instead"
    if names and all(name.endswith(".npy") for name in names):
        return f"it is a NumPy archive (.npz) with {listed(names)}; {WANTED}"
    if "model.weights.h5" in names:
        return f"it is a Keras model; {WANTED}"
    if weights:
        return f"it is a zip archive with {listed(weights)}; {PACKED}"
    return f"it is a zip archive that torch.save did not write, with {listed(names)}; {WANTED}"


def listed(names: list[str], shown: int = 4) -> str:
    """Joins the first names for a message, and says how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "") or "nothing"
