import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.pretrained.torch_files import check_weights_file, open_weights, read_torch_file
from tests.commands import ROOT

FILES = ROOT / "tests/golden/torch"


def archive(kind, **files):
    """Returns a zip or tar archive of files."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as packed:
            for name, content in files.items():
                packed.writestr(name.replace("__", "/").replace("_DOT_", "."), content)
    else:
        with tarfile.open(fileobj=stream, mode="w") as packed:
            for name, content in files.items():
                info = tarfile.TarInfo(name.replace("_DOT_", "."))
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def saved(save, *arrays, **named):
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


WEIGHTS = (FILES / "state_zip.pth").read_bytes()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 102530333\n"
KINDS = {
    "empty": (b"", "the file is empty"),
    "pointer": (POINTER, "a Git LFS pointer, not the weights; fetch them with git lfs pull"),
    "page": (b"\n <!DOCTYPE html>\n<html><body>Sign in</body></html>", r"a web page \(HTML\), not weights"),
    "page in capitals": (b"<HTML><HEAD>", r"a web page \(HTML\)"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', r"a web page \(HTML\)"),
    "json": (json.dumps({"error": "not found"}).encode(), "a JSON file"),
    "text": (b"404: Not Found", "a text file that starts with '404: Not Found'"),
    "blank": (b"\n \r\n", "the file holds only blanks"),
    "stub": (b"\x80", "cut short"),
    "gzip": (gzip.compress(WEIGHTS), "compressed with gzip; unpack it first"),
    "zip of weights": (archive("zip", a__w_DOT_pth=WEIGHTS), r"a zip archive with a/w\.pth; unpack it first"),
    "other zip": (archive("zip", word__document_DOT_xml=b"x"), "archive that torch.save did not write, with word/"),
    "exported": (archive("zip", p__archive_format=b"pt2"), "a program written by torch.export"),
    "keras": (archive("zip", **{"model_DOT_weights_DOT_h5": b"x", "config_DOT_json": b"x"}), "a Keras model"),
    "tar of weights": (archive("tar", w_DOT_pth=WEIGHTS), r"a tar archive with w\.pth; unpack it first"),
    "damaged tar": (b"a" * 257 + b"ustar" + bytes(300), "a damaged or incomplete tar archive: "),
    "cut tar": (archive("tar", w_DOT_pth=WEIGHTS * 50)[:600], "a damaged or incomplete tar archive: "),
    "old tar": (
        archive("tar", sys_info=b"x", pickle=b"x", tensors=b"x", storages=b"x"),
        r"a tar archive from PyTorch before 0\.1\.10, which is not supported",
    ),
    "parts": (b'{"metadata": {"total_size": 9},\n"weight_map": {"a": "b"}}', "the index of weights in several files"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file, as Keras writes"),
    "npy": (saved(np.save, np.ones(3)), "a NumPy array"),
    "npz": (saved(np.savez, w=np.ones(3)), r"a NumPy archive \(\.npz\) with w\.npy"),
    "onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x032.1:\x90" + bytes(40), "an ONNX model"),
    "saved model": (b"\x08\x01\x12\xf0\x05" + bytes(40), "a TensorFlow SavedModel"),
    "index": (bytes(range(1, 60)) + bytes.fromhex("57fb808b247547db"), "the index of a TensorFlow checkpoint"),
    "lite": (b"\x1c\x00\x00\x00TFL3" + bytes(40), "a TensorFlow Lite model"),
    "msgpack": (b"\x82\xa6params\x81" + bytes(40), "a msgpack file, as Flax writes"),
    "image": (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG image"),
    "noise": (
        b"\xac\x0a\x7f" + bytes(60),
        r"not a known kind of weights file \(it starts with the bytes ac 0a 7f",
    ),
}


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_is(kind, ending, tmp_path):
    content, message = KINDS[kind]
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^cannot read weights {path}: .*{message}"), open_weights(path):
        pass


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.bin"])
def test_a_part_of_the_weights_says_so(name, tmp_path):
    (tmp_path / name).write_bytes(WEIGHTS)
    with pytest.raises(UserError, match=r"it is part \d of 2 of the weights; save the network in one file first"):
        check_weights_file(tmp_path / name)


def test_torchscript(tmp_path):
    with pytest.raises(UserError, match=r"a TorchScript program, .*torch\.jit\.load\(FILE\)\.state_dict\(\)"):
        read_torch_file(FILES / "script.pt")


def test_folders_and_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.SAFETENSORS").write_bytes(b"")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")
    for name, message in (
        ("empty", "it is an empty folder"),
        ("hub", r"it is a folder; name a file in it: model\.SAFETENSORS"),
        ("saved", "the folder of a TensorFlow SavedModel"),
        ("none", "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            check_weights_file(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["state_zip.pth", "checkpoint_legacy.pth", "state.safetensors", "training_ema.pth", "pickled.pkl"]
)
def test_a_cut_or_damaged_file_says_so(name, tmp_path):
    whole = (FILES / name).read_bytes()
    path = tmp_path / "weights.bin"
    for share in (0.1, 0.3, 0.5, 0.8, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="the file is cut short"), open_weights(path) as contents:
            contents.state_dict()


def test_a_changed_byte_of_an_archive_is_noticed(tmp_path):
    whole = bytearray((FILES / "training_ema.pth").read_bytes())
    place = whole.index(np.float32(1.0).tobytes(), 8000)
    whole[place] ^= 1
    path = tmp_path / "weights.pth"
    path.write_bytes(whole)
    message = r"cut short or damaged; fetch it again \(Bad CRC-32"
    with pytest.raises(UserError, match=message), open_weights(path) as contents:
        for leaf in contents.leaves:
            leaf.tensor.array()
