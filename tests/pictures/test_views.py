import numpy as np
import pytest

from hga_flax.data.pipeline import Shard, create_dataset
from hga_flax.errors import UserError
from hga_flax.pictures import views as v
from tests.training import tiny


def test_images_are_those_of_evaluation():
    config = tiny.config(data__fake=False, data__name="digits", data__image_size=24)
    dataset = create_dataset(config.data, 0)
    source = dataset.open("test")
    batch = next(dataset.eval_batches(dataset.source("test"), 8, Shard()))
    images = v.preprocess([(str(i), source[i]["image"]) for i in range(8)], config, 1)
    assert images.dtype == np.uint8 and (images == batch["image"]).all()


def test_a_bad_image_is_named():
    with pytest.raises(UserError, match=r"^b\.png: the image of 3 bytes cannot be decoded"):
        v.preprocess([("b.png", b"abc")], tiny.config(), 3)


def test_classes_are_found_by_name_before_index():
    names = ["1", "cat", "dog"]
    assert [v.find_class(wanted, names, 3, "DIR") for wanted in ("1", "cat", "2", "0")] == [0, 1, 2, 0]
    assert v.find_class("2", (), 3, "DIR") == 2
    for wanted, message in (("dgo", "did you mean 'dog'"), ("3", "an index up to 2"), ("-1", "an index up to 2")):
        with pytest.raises(UserError, match=f"--class={wanted}: DIR has no such class.*{message}"):
            v.find_class(wanted, names, 3, "DIR")


def test_titles_tell_the_class_and_what_was_predicted_instead():
    logits = np.log(np.array([[0.25, 0.75], [0.005, 0.995]], np.float32))
    assert v.class_titles(logits, np.array([1, 0]), ["a", "b"]) == ["b (75 %)", "a (0.5 %)\npredicted b (99.5 %)"]
    assert v.class_titles(logits[:1], np.array([0]), ())[0].startswith("0 (25 %)")
    assert [v.percent(share) for share in (0, 0.0001, 0.5, 0.9999, 1)] == ["0 %", "0 %", "50 %", "100 %", "100 %"]


def test_labels_tell_the_runs_apart():
    make = lambda label, path: v.View(label, path, None, [], None, [])
    labels = lambda *runs: [view.label for view in v.with_labels([make(*run) for run in runs])]
    assert labels(("hga", "x/a"), ("se", "x/b")) == ["hga", "se"]
    assert labels(("hga", "x/a"), ("hga", "x/b")) == ["a", "b"]
    assert labels(("hga", "x/a"), ("hga", "y/a")) == ["x/a", "y/a"]
