"""Reads the size that an image's header claims, without decoding the image.

jpeg.py reads the headers of JPEGs, because training needs more of them than the size.
"""

import re
import struct

from hga_flax.images.jpeg import read_head

TIFF_WIDTH, TIFF_HEIGHT, TIFF_EXTRA_SAMPLES = 256, 257, 338  # tags
TIFF_NUMBERS = {3: "H", 4: "I", 16: "Q"}  # type of a value: its struct format


def claimed_size(data: bytes) -> tuple[int, int] | None:
    """Returns the (height, width) that a PNG, GIF, BMP, WebP, TIFF or JPEG claims; None if it cannot be read."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            width, height = struct.unpack_from(">II", data, 16)
        elif data[:4] == b"GIF8":
            width, height = struct.unpack_from("<HH", data, 6)
        elif data[:2] == b"BM":
            old = struct.unpack_from("<I", data, 14)[0] == 12  # OS/2's header
            width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        elif data[:2] in (b"II", b"MM"):
            tags = _tiff(data)
            width, height = tags.get(TIFF_WIDTH, 0), tags.get(TIFF_HEIGHT, 0)
            return (height, width) if height and width else None
        else:
            head = read_head(data)
            return None if head is None else head.size
        return abs(height), abs(width)  # the height is negative in a BMP stored from the top down
    except (struct.error, OverflowError):  # truncated, or with an offset of nonsense
        return None


def netpbm_white(data: bytes) -> int | None:
    """Returns the value of white in a PGM, PPM or PAM (255 for 8 bits, 65535 for 16); None for other files."""
    head = _netpbm_head(data)
    found = re.match(rb"P[2356]\s+\d+\s+\d+\s+(\d+)\s", head) or re.match(rb"P7\s(?s:.*?)\bMAXVAL\s+(\d+)\s", head)
    return int(found[1]) if found else None


def pam_has_alpha(data: bytes) -> bool:
    """Returns whether a file is a PAM with a channel of transparency."""
    return re.match(rb"P7\s(?s:.*?)\bTUPLTYPE\s+\w+_ALPHA\s", _netpbm_head(data)) is not None


def _netpbm_head(data: bytes) -> bytes:
    return re.sub(rb"#[^\r\n]*", b"", data[:4096]) if data[:1] == b"P" else b""


def tiff_has_alpha(data: bytes) -> bool:
    """Returns whether a file is a TIFF with a channel of transparency."""
    try:
        return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and TIFF_EXTRA_SAMPLES in _tiff(data)
    except (struct.error, OverflowError):
        return False


def avif_turns(data: bytes) -> set[int] | None:
    """Returns by how many quarters of a turn, counterclockwise, an AVIF file's images are to be turned.

    None if one is to be mirrored too, which no camera writes. The boxes are those of HEIF (ISO/IEC 23008-12).
    """
    if data[4:12] not in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return {0}
    start = int.from_bytes(data[:4], "big")
    while data[start + 4 : start + 8] not in (b"meta", b""):
        start += max(8, int.from_bytes(data[start : start + 4], "big"))
    meta = data[start : start + int.from_bytes(data[start : start + 4], "big")]
    if b"imir" in meta:
        return None
    return {turn[0] & 3 for turn in re.findall(rb"\0\0\0\x09irot(.)", meta, re.DOTALL)} or {0}


def _webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        return None
    return height, width


def _tiff(data: bytes) -> dict[int, int]:
    """Returns the first value of each numeric tag of a TIFF's first image."""
    order = "<" if data[:2] == b"II" else ">"
    large = struct.unpack_from(order + "H", data, 2)[0] == 43  # BigTIFF
    first = struct.unpack_from(order + ("Q" if large else "I"), data, 8 if large else 4)[0]
    count = struct.unpack_from(order + ("Q" if large else "H"), data, first)[0]
    start, length, value = (first + 8, 20, 12) if large else (first + 2, 12, 8)
    tags = {}
    for entry in range(start, start + length * min(count, 1000), length):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if kind in TIFF_NUMBERS:
            tags[tag] = struct.unpack_from(order + TIFF_NUMBERS[kind], data, entry + value)[0]
    return tags
