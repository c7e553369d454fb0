"""The size of a JPEG, read from its head without decoding it."""

import struct

EXIF = b"Exif\0\0"
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
# Start-of-frame markers, which hold the size.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of the upright image, None where `data` is no JPEG or its head is odd."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    position, sideways = 2, False
    try:
        while data[position] == 0xFF:
            marker = data[position + 1]
            length = (data[position + 2] << 8) | data[position + 3]
            if marker in FRAMES:
                height, width = struct.unpack_from(">HH", data, position + 5)
                return (width, height) if sideways else (height, width)
            if marker == 0xE1 and data[position + 4 : position + 10] == EXIF:
                sideways = _orientation(data[position + 10 : position + 2 + length]) in SIDEWAYS
            position += 2 + length
    except (IndexError, struct.error):
        pass
    return None


def _orientation(tiff: bytes) -> int:
    """Returns the orientation of an EXIF block, 1 (upright) where it names none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    for entry in range(first + 2, first + 2 + 12 * count, 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == ORIENTATION:
            return value
    return 1
