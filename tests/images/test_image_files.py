import os
import struct

import cv2
import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.images.bad_images import BadImage
from hga_flax.images.decoding import decode
from hga_flax.images.image_files import SUFFIXES, Endings, ignored_line, images_below, read_image

IMAGE = np.full((40, 50, 3), 90, np.uint8)
ENCODED_AS = {".jfif": ".jpg", ".jp2": ".jp2"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_ending_in_the_list_is_decoded(suffix):
    image = IMAGE[..., 0] if suffix in (".pbm", ".pgm") else IMAGE
    encoded = cv2.imencode(ENCODED_AS.get(suffix, suffix), image)[1].tobytes()
    pixels = decode(encoded, 3)
    assert pixels.shape == (40, 50, 3) and pixels.dtype == np.uint8


def test_images_of_all_folders_below_are_found_and_the_rest_is_counted(tmp_path):
    for name in ("b.BMP", "a.jpg", "sub/c.tiff", "sub/deep/d.jfif", "notes.txt", "sub/raw.CR2", "sub/x.cr2", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in (".hidden.jpg", "Thumbs.db", "Icon\r", "desktop.ini", "__MACOSX/a.jpg", "@eaDir/a.jpg", ".git/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    ignored = Endings()
    found = [name.removeprefix(f"{tmp_path}/") for name in images_below(tmp_path, ignored)]
    assert found == ["a.jpg", "b.BMP", "sub/c.tiff", "sub/deep/d.jfif"]
    line = ignored_line(ignored, "train")
    assert line == "ignored 4 files that are not images in train: 2 .cr2, 1 .txt, 1 without a suffix"
    assert ignored_line(Endings(), "train") == ""


def test_links_to_folders_are_followed_and_none_leads_round_in_circles(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.png").touch()
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "class" / "up").symlink_to(tmp_path / "class")
    assert list(images_below(tmp_path / "class")) == [str(tmp_path / "class" / "linked" / "a.png")]


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere: No such file"):
        list(images_below(tmp_path / "nowhere"))


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImage, match="it is not a regular file"):
        read_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"bytes")
    assert read_image(tmp_path / "b.png") == b"bytes"


@pytest.mark.parametrize("head", [b"Pf", b"PF"])
def test_an_image_of_floats_is_refused(head):
    pfm = head + b"\n4 4\n-1.0\n" + struct.pack("<48f", *[0.5] * 48)[: 64 if head == b"Pf" else 192]
    for channels in (1, 3):
        with pytest.raises(BadImage, match=r"^images of floats \(PFM\) are not read; convert it to PNG"):
            decode(pfm, channels)
