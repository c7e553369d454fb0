import json
import re
import shutil
import sys
import types

import numpy as np
import pytest

from hga_flax.__main__ import main
from hga_flax.data import packing, sources
from hga_flax.data.digits import prepare_digits
from hga_flax.data.sources import DatasetInfo, SyntheticSource, data_directory, dataset_info, open_source
from hga_flax.errors import UserError

features = packing.tfds.features
INFO = DatasetInfo("x", 10, 3, ())


def test_a_tfds_data_set_is_known_before_it_is_prepared(tmp_path):
    info = dataset_info("imagenet2012", str(tmp_path))
    assert (info.num_classes, info.channels, len(info.class_names)) == (1000, 3, 1000)
    assert dataset_info("digits").class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: dataset_info("imagenet2013", d), "did you mean 'imagenet2012'"),
        (lambda d: dataset_info("imdb_reviews", d), "not an image classification data set"),
        (lambda d: open_source("imagenet2012", "train", d), "is not prepared in"),
        (lambda d: open_source("digits", "tran", d), "it has: train, test"),
        (lambda d: open_source("digits", "train", "/dev/null/x"), "data.dir: cannot use"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(call, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        call(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "mnist", "pets"])  # ours, one that TFDS knows, one packed
def test_a_data_set_prepared_as_tfrecord_is_to_be_prepared_again(name, tmp_path):
    """As most of those that were prepared for other projects are."""
    target = tmp_path / name / {"mnist": "3.0.1"}.get(name, "1.0.0")
    shutil.copytree(prepare_digits(data_directory("")), target)
    info = json.loads((target / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord", "name": name}
    info["version"] = target.name
    for split in info["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (target / "dataset_info.json").write_text(json.dumps(info))
    for file in target.glob("*.array_record*"):
        file.rename(target / file.name.replace("array_record", "tfrecord").replace("digits", name))
    with pytest.raises(UserError, match=f"^{name} in {tmp_path} is not in array_record format; prepare it again"):
        open_source(name, "train", str(tmp_path))


def test_split_notation():
    assert len(open_source("digits", "train[:10%]")) == 150


@pytest.mark.parametrize("split", ["train", "train[10:30]", "train[:5]+test[-5:]"])
def test_the_examples_are_those_that_tfds_reads(split):
    ours = open_source("digits", split)
    theirs = sources.open_builder("digits", "").as_data_source(
        split, decoders={"image": sources._tfds().decode.SkipDecoding()}
    )
    assert len(ours) == len(theirs) > 0
    for index in (0, 3, len(ours) - 1):
        assert ours[index] == {name: theirs[index][name] for name in ("image", "label")}
    assert ours.__getitems__([3, 0]) == [ours[3], ours[0]]


class Pixels(packing.tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set whose images are arrays, not files, as a user's TFDS builder may make it."""

    VERSION = packing.tfds.core.Version("1.0.0")

    def _info(self):
        pixels = features.Tensor(shape=(2, 2, 1), dtype=np.uint8)
        named = features.FeaturesDict({"image": pixels, "label": features.ClassLabel(names=["a", "b"])})
        return packing.tfds.core.DatasetInfo(builder=self, features=named)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {"image": np.full((2, 2, 1), i, np.uint8), "label": i % 2}


def test_images_stored_as_arrays_are_read_by_tfds(tmp_path):
    Pixels(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = open_source("pixels", "train", str(tmp_path))
    read = sorted((int(source[i]["image"].sum()), int(source[i]["label"])) for i in range(len(source)))
    assert read == [(0, 0), (4, 1), (8, 0)]


def test_a_packed_images_name_is_read(tmp_path):
    image = b"an image"
    examples = lambda: iter([("a", {"image": image, "label": 1, "file_name": "b/ä.jpg"})])
    packing.pack("mine", {"train": examples}, ("a", "b"), (None, None, 3), tmp_path, file_names=True)
    source = open_source("mine", "train", str(tmp_path))
    assert len(source) == 1 and source[0] == {"image": image, "label": 1, "file_name": "b/ä.jpg".encode()}


def test_synthetic_images_are_a_function_of_the_index_and_show_their_class():
    source = SyntheticSource(300, 8, INFO)
    assert len(source) == 300
    record = source[7]
    assert record["image"].shape == (8, 8, 3) and record["image"].dtype == np.uint8
    np.testing.assert_array_equal(record["image"], SyntheticSource(300, 8, INFO)[7]["image"])
    means = {label: [] for label in range(10)}
    for i in range(300):
        means[source[i]["label"]].append(source[i]["image"].mean(axis=(0, 1)))
    centres = {label: np.mean(m, axis=0) for label, m in means.items()}
    right = [
        min(centres, key=lambda c: np.abs(centres[c] - m).sum()) == label for label, ms in means.items() for m in ms
    ]
    assert np.mean(right) > 0.7


def test_the_default_directory_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data_directory("") == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert str(data_directory("")).endswith("tensorflow_datasets")
    assert data_directory("/x").as_posix() == "/x"


def write_features(folder, class_name):
    """A data set on disk whose features.json names a Python class for its image."""
    folder.mkdir(parents=True)
    inner = {"featuresDict": {"features": {"image": {"pythonClassName": class_name}}}}
    whole = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"} | inner
    (folder / "features.json").write_text(json.dumps(whole))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("name", ["mine", "digits"])
def test_a_data_set_on_disk_cannot_have_modules_imported(name, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("import pathlib; pathlib.Path(__file__).with_name('trace').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    write_features(tmp_path / name / "1.0.0", "evil_module.Image")
    for call in (dataset_info, lambda name, directory: open_source(name, "train", directory)):
        with pytest.raises(UserError, match=r"names the Python class evil_module\.Image, which is not part of TFDS"):
            call(name, str(tmp_path))
    assert not (tmp_path / "trace").exists() and "evil_module" not in sys.modules


def test_nor_can_one_behind_a_link_or_one_to_prepare(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    write_features(tmp_path / "elsewhere", "evil_module.Image")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.0.0").symlink_to(tmp_path / "elsewhere")
    write_features(tmp_path / "other" / "configured" / "1.0.0", "evil_module.Image")
    for name in ("mine", "other"):
        with pytest.raises(UserError, match=r"names the Python class evil_module\.Image"):
            open_source(name, "train", str(tmp_path))
        with pytest.raises(UserError, match=r"names the Python class evil_module\.Image"):
            main(["prepare", name, f"--data-dir={tmp_path}"])
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "overwritten"])
def test_a_damaged_file_of_a_data_set_is_one_line(damage, tmp_path):
    shutil.copytree(prepare_digits(data_directory("")), tmp_path / "digits" / "1.0.0")
    (file,) = (tmp_path / "digits" / "1.0.0").glob("*train*record*")
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "overwritten":
        file.write_bytes(data[:70_000] + bytes(len(data) - 70_000 - 70_000) + data[-70_000:])
    else:
        file.write_bytes(data[: len(data) // 2 * (damage == "half")])
    with pytest.raises(UserError, match=r"^data\.dir: .*digits/1\.0\.0 is damaged or incomplete, prepare it again: "):
        source = open_source("digits", "train", str(tmp_path))
        for index in range(len(source)):
            source[index]
    with pytest.raises(UserError, match="is damaged or incomplete"):
        source = open_source("digits", "train", str(tmp_path))
        source.__getitems__(list(range(len(source))))


def test_a_damaged_description_is_one_line(tmp_path):
    write_features(tmp_path / "mine" / "1.0.0", "tensorflow_datasets.core.features.image_feature.Image")
    for text in ("{", "[" * 100_000, "{}"):
        (tmp_path / "mine" / "1.0.0" / "features.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot be read|TFDS cannot open it"):
            dataset_info("mine", str(tmp_path))


@pytest.mark.parametrize("name", ["", "../digits", "a b", "gs://x/y", "mnist/", "mnist/x=1", "huggingface:x", "MyData"])
def test_a_name_leads_nowhere_else(name, tmp_path):
    with pytest.raises(UserError, match="not the name of a data set"):
        dataset_info(name, str(tmp_path))


LABEL, IMAGE = features.ClassLabel(num_classes=2), features.Image()
NO_LABEL = "'x' is not an image classification data set: its 'label' is a {}, not a ClassLabel with a number of classes"
NO_IMAGE = "'x' is not an image classification data set: its 'image' is a feature {}, not an Image of uint8 or uint16"


def info_of(monkeypatch, **named):
    """The `DatasetInfo` of a TFDS data set with these features."""
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features.FeaturesDict(named)))
    monkeypatch.setattr(sources, "open_builder", lambda name, directory: builder)
    return dataset_info("x")


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (features.Image(shape=(8, 8, 4)), LABEL, "'x' are (8, 8, 4); only 1 (grey) or 3 (RGB) channels"),
        (features.Tensor(shape=(8, 3), dtype=np.uint8), LABEL, "'x' are (8, 3); only 1 (grey) or 3 (RGB) channels"),
        (features.Tensor(shape=(), dtype=np.uint8), LABEL, "'x' are (); only 1 (grey) or 3 (RGB) channels"),
        (features.Image(shape=(8, 8, 1), dtype=np.float32), LABEL, NO_IMAGE.format("Image of float32")),
        (features.Tensor(shape=(8, 8, 1), dtype=np.float32), LABEL, NO_IMAGE.format("Tensor of float32")),
        (features.Tensor(shape=(8, 8, 1), dtype=np.uint16), LABEL, NO_IMAGE.format("Tensor of uint16")),
        (features.LabeledImage(labels=3, shape=(8, 8, 1)), LABEL, NO_IMAGE.format("LabeledImage of uint8")),
        (features.Sequence(IMAGE), LABEL, NO_IMAGE.format("Sequence of uint8")),
        (IMAGE, features.Sequence(LABEL), NO_LABEL.format("Sequence")),
        (IMAGE, features.FeaturesDict({"a": LABEL}), NO_LABEL.format("FeaturesDict")),
        (IMAGE, features.Text(), NO_LABEL.format("Text")),
        (IMAGE, features.Scalar(np.int64), NO_LABEL.format("Scalar")),
        (IMAGE, features.ClassLabel(), NO_LABEL.format("ClassLabel")),
    ],
)
def test_what_is_no_image_or_no_class_is_refused_by_name(image, label, message, monkeypatch):
    with pytest.raises(UserError, match=re.escape(message)):
        info_of(monkeypatch, image=image, label=label)


@pytest.mark.parametrize(
    "image",
    [
        features.Image(shape=(None, None, 1)),
        features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format="png"),
        features.Tensor(shape=(None, None, 1), dtype=np.uint8),
    ],
)
def test_images_of_8_and_16_bits_and_arrays_of_8_bits_are_images(image, monkeypatch):
    info = info_of(monkeypatch, image=image, label=LABEL)
    assert (info.num_classes, info.channels, info.class_names) == (2, 1, ("0", "1"))
