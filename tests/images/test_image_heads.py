"""What the heads of images claim, against OpenCV's encoders, and that too much of it is refused."""

import os
import struct
import subprocess
import sys

import cv2
import numpy as np
import pytest

from hga_flax.images import MAX_PIXELS
from hga_flax.images.bad_images import BadImage
from hga_flax.images.decoding import decode
from hga_flax.images.host_augmentation import decode_for_crop
from hga_flax.images.image_heads import avif_turns, claimed_size, netpbm_white, tiff_has_alpha
from tests.commands import ROOT

IMAGE = np.random.RandomState(0).randint(0, 256, (33, 70, 3), np.uint8)


def encoded(ending, *parameters):
    ok, data = cv2.imencode(ending, IMAGE, parameters)
    assert ok
    return data.tobytes()


FILES = {
    "png": encoded(".png"),
    "gif": encoded(".gif"),
    "bmp": encoded(".bmp"),
    "webp": encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 80),
    "webp, lossless": encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
    "tiff": encoded(".tiff"),
    "jpeg": encoded(".jpg"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_size_is_read_from_the_head(name):
    data = FILES[name]
    assert claimed_size(data) == IMAGE.shape[:2] == decode(data, 3).shape[:2]
    for length in range(0, min(len(data), 200), 7):
        claimed_size(data[:length])  # cut off anywhere it is no error
    assert claimed_size(data[:1]) is None


def test_heads_that_opencv_does_not_write():
    extended = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + (29_999).to_bytes(3, "little") + (9).to_bytes(3, "little")
    assert claimed_size(extended) == (10, 30_000)
    big = b"MM\0+\0\x08\0\0" + struct.pack(">QQ", 16, 2)
    big += struct.pack(">HHQQ", 256, 16, 1, 50_000) + struct.pack(">HHQHHI", 257, 3, 1, 40_000, 0, 0)
    assert claimed_size(big) == (40_000, 50_000)
    assert claimed_size(b"BM" + bytes(12) + struct.pack("<IHH", 12, 7, 5)) == (5, 7)
    assert claimed_size(b"BM" + bytes(12) + struct.pack("<Iii", 40, 7, -5)) == (5, 7)


def test_heads_of_nonsense_have_neither_turns_nor_transparency():
    for end in (0, 4, 8, 12, 20):
        for head in (b"\0\0\0\x0cftypavif" + b"\0" * 20, b"II*\0" + b"\xff" * 20, b"MM\0*" + b"\0" * 20):
            assert avif_turns(head[:end]) == {0} and not tiff_has_alpha(head[:end])
    box = lambda kind, content: (8 + len(content)).to_bytes(4, "big") + kind + content
    turned = box(b"ftyp", b"avif") + box(b"free", b"irot") + box(b"meta", box(b"irot", b"\x01") + box(b"irot", b"\x02"))
    assert avif_turns(turned) == {1, 2}


def test_offsets_beyond_all_bounds_are_no_size():
    for order in (b"II\x2b\0\x08\0\0\0", b"MM\0\x2b\0\x08\0\0"):
        assert claimed_size(order + b"\xff" * 8 + bytes(64)) is None


def claiming(name, height, width):
    """A file whose head claims another size than its data have."""
    data = bytearray(FILES[name])
    if name == "png":
        struct.pack_into(">II", data, 16, width, height)
    elif name == "gif":
        struct.pack_into("<HH", data, 6, width, height)
    elif name == "bmp":
        struct.pack_into("<ii", data, 18, width, height)
    elif name == "webp":
        struct.pack_into("<HH", data, data.index(b"\x9d\x01\x2a") + 3, width, height)
    elif name == "tiff":
        (first,) = struct.unpack_from("<I", data, 4)
        for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
            tag = struct.unpack_from("<H", data, entry)[0]
            if tag in (256, 257):
                struct.pack_into("<HHII", data, entry, tag, 4, 1, width if tag == 256 else height)
    elif name == "jpeg":
        frame = data.index(b"\xff\xc0")
        struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


@pytest.mark.parametrize("name", ["png", "gif", "bmp", "webp", "tiff", "jpeg"])
def test_what_claims_too_much_is_a_bad_image(name):
    size = (16_000, 16_383)  # below OpenCV's own limit of 2**30
    data = claiming(name, *size)
    assert claimed_size(data) == size and np.prod(size) > MAX_PIXELS
    for channels in (1, 3):
        with pytest.raises(BadImage, match=r"^it claims 16,383 x 16,000 pixels, above the limit of 178,956,970"):
            decode(data, channels)
    with pytest.raises(BadImage, match=r"^it claims 16,383 x 16,000 pixels"):
        decode_for_crop(data, 3, 224, lambda height, width: pytest.fail("drawn"))


def test_opencv_is_told_the_limit_for_all_other_formats(tmp_path):
    script = (
        "import hga_flax.images.decoding as h; from hga_flax.images.bad_images import BadImage\n"
        "try: h.decode(b'P5 20000 20000 255\\n' + bytes(64), 1)\n"
        "except BadImage as error: print(error)"
    )
    command = [sys.executable, "-c", script]
    environment = {k: v for k, v in os.environ.items() if k != "OPENCV_IO_MAX_IMAGE_PIXELS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "it claims more pixels than the limit of 178,956,970: make it smaller\n" and not done.stderr


STRIPS = """
import resource, sys
import cv2, numpy as np
from configs import base
from hga_flax.images.host_augmentation import host_transform
data = base.get_config().data
transform = host_transform(data, 3, train=False, seed=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shape in ((1, 3000, 3), (3000, 1, 3), (6, 60000, 3)):
    strip = cv2.imencode(".jpg", np.full(shape, 90, np.uint8))[1].tobytes()
    assert transform(strip, 0, 0).shape == (224, 224, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_strips_take_no_memory():
    command = [sys.executable, "-c", STRIPS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000  # kB; the whole strips, enlarged, took 649 MB and 3.2 GB


@pytest.mark.parametrize(
    ("head", "white"),
    [
        (b"P5\n4 4\n255\n", 255),
        (b"P6 4 4 65535\n", 65535),
        (b"P5\n# 1 2 3 4\n4 4 # more\n15\n", 15),
        (b"P2\r\n4 4\r\n1023\r\n", 1023),
        (b"P7\nWIDTH 4\nHEIGHT 4\nDEPTH 3\nMAXVAL 100\nTUPLTYPE RGB\nENDHDR\n", 100),
        (b"P4\n4 4\n", None),  # bits
        (FILES["png"], None),
        (b"Photo", None),
    ],
)
def test_white_of_netpbm_is_read_from_the_head(head, white):
    assert netpbm_white(head) == white


def test_other_ranges_would_be_too_dark_and_are_refused():
    assert decode(b"P5\n4 4\n255\n" + bytes([255]) * 16, 3).max() == 255
    assert decode(b"P5\n4 4\n65535\n" + b"\xff" * 32, 3).max() == 255
    with pytest.raises(BadImage, match="its white is 1023; PGM, PPM and PAM are read only with 255 or 65535"):
        decode(b"P5\n4 4\n1023\n" + b"\x03\xff" * 16, 3)
