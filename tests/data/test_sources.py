import numpy as np
import pytest

from hga_flax.data.sources import DatasetInfo, SyntheticSource, data_directory, dataset_info, open_source
from hga_flax.errors import UserError

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


def test_split_notation():
    assert len(open_source("digits", "train[:10%]")) == 150


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
