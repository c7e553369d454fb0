import pathlib

import cv2
import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from hga_flax.data.sources import DatasetInfo
from hga_flax.errors import UserError
from hga_flax.inference import from_weights
from hga_flax.inference.from_weights import CIFAR10, base_config, describe_weights, restore_weights
from hga_flax.inference.predictor import Predictor
from hga_flax.pretrained.torch_weights import torch_tensors
from hga_flax.training.restore import evaluate_restored, restore_workdir
from hga_flax.training.trainer import train
from hga_flax.training.weights_source import Source
from tests import torch_writer
from tests.pretrained.test_torch_contents import RAW
from tests.training import tiny
from tests.training.test_initial_weights import places, resnet

SMALL = "--config.model.options=stage_sizes=(1,), features=2"  # of a ResNet-50


def cifar_file(folder, shortcut="A", classes=10):
    from hga_flax.pretrained.torch_weights import _torch_shape, peer_name
    from tests.goldens_models import rule_tensor

    there = places("cifar_resnet8", channels=3, classes=classes, features=16, shortcut=shortcut)
    shapes = {
        peer_name("pytorch_resnet_cifar10/resnet8", path[1:]): _torch_shape(path, leaf.shape)
        for path, leaf in there.items()
    }
    tensors = {name: rule_tensor(name, list(shape)).astype(np.float32) for name, shape in shapes.items()}
    return str(torch_writer.save_legacy({"state_dict": tensors}, folder / "resnet8.th"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return cifar_file(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of ten classes in DIR/val, without DIR/train."""
    root, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in CIFAR10:
        (root / "val" / name).mkdir(parents=True)
        for i in range(2):
            cv2.imwrite(str(root / "val" / name / f"{i}.png"), draws.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    return root


def test_evaluation_on_a_folder_without_a_training_split(cifar, folder):
    overrides = ["--config.data.name=folder", f"--config.data.dir={folder}", "--config.data.eval_split=val"]
    restored = restore_weights(cifar, "cifar_resnet8", config=base_config(), overrides=overrides, data=True)
    result = evaluate_restored(restored)
    predictor = Predictor(restored)
    files = sorted(folder.glob("val/*/*.png"))
    top = predictor.predict(files).argmax(axis=1)
    wrong = np.mean([predictor.class_names[i] != file.parent.name for i, file in zip(top, files, strict=True)])
    assert result["num_examples"] == 20 and result["top1_error"] == pytest.approx(100 * wrong)


def test_what_is_known_is_used_and_what_is_given_wins(cifar):
    restored = restore_weights(cifar, "cifar_resnet8")
    data, rows = restored.experiment.config.data, dict(describe_weights(restored))
    assert data.mean == (0.485, 0.456, 0.406) and restored.experiment.eval_image_shape == (32, 32, 3)
    assert rows["weights"].endswith("resnet8.th, its state_dict, read as pytorch_resnet_cifar10/resnet8")
    assert rows["images"] == "32 pixels, the whole image" and rows["mean, std"].startswith("0.485, 0.456")
    assert restored.experiment.config.model.options == "shortcut='A'"
    assert restored.experiment.dataset.info.class_names == CIFAR10 and restored.step is None
    given = restore_weights(cifar, "cifar_resnet8", overrides=["--config.data.mean=0.5", "--config.data.image_size=40"])
    assert given.experiment.config.data.mean == (0.5,) and given.experiment.image_shape == (40, 40, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.eval_crop_fraction=0.5", "only data.augmentation='imagenet' crops images for evaluation"),
        ("data.rotation_degrees=5", "has no effect with --weights, which is evaluated and not trained"),
        ("optimizer.learning_rate=5", "has no effect with --weights"),
        ("training.epochs=5", "has no effect with --weights"),
    ],
)
def test_what_evaluation_does_not_read_is_refused(cifar, override, message):
    with pytest.raises(UserError, match=message):
        restore_weights(cifar, "cifar_resnet8", overrides=[f"--config.{override}"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 3),
        ("cpu_devices", 0),
        ("deterministic", False),
        ("compilation_cache", ""),
        ("lost_process_seconds", 20.0),
    ],
)
def test_what_evaluation_reads_is_taken(cifar, key, value):
    restored = restore_weights(cifar, "cifar_resnet8", overrides=[f"--config.training.{key}={value}"])
    assert restored.experiment.config.training[key] == value


@pytest.mark.medium
def test_a_run_keeps_its_network_and_takes_the_size_that_is_given(workdir):
    size = lambda *flags: restore_weights(str(workdir), overrides=flags).experiment.eval_image_shape[0]
    assert size("--config.data.image_size=48") == size("--config.evaluation.image_size=48") == 48
    for flags in ({"model": "cifar_resnet20"}, {"attention": "se"}, {"overrides": ["--config.model.attention=se"]}):
        with pytest.raises(UserError, match=r"only for --weights=FILE; the run in .* has its own network"):
            restore_weights(str(workdir), **flags)


def test_paths_and_a_single_override_are_taken_as_they_are_written(cifar):
    given = restore_weights(
        pathlib.Path(cifar), "cifar_resnet8", config=pathlib.Path("configs/cifar10.py"), overrides="--config.seed=3"
    )
    assert given.experiment.config.seed == 3 and given.experiment.config.model.name == "cifar_resnet8"


def test_a_file_of_torchvisions(tmp_path):
    file = torch_writer.save({"model": RAW}, tmp_path / "resnet50-11ad3fa6.pth")
    predictor = Predictor.from_weights(str(file), "resnet50", overrides=[SMALL])
    assert predictor.image_shape == (224, 224, 3) and predictor.class_names == ("0", "1", "2")  # three classes
    images = dict(describe_weights(predictor.restored))["images"]
    assert images == "224 pixels, the centre after resizing the short side to 232"


@pytest.mark.parametrize(("options", "mean"), [("", 0.5), (", transform_input=True", 0.485)])
def test_googlenets_images_are_transformed_once(options, mean, tmp_path, short_googlenet):
    there = places("googlenet", channels=3, classes=3, width_divisor=8)
    arrays = {path: np.ones(leaf.shape, np.float32) for path, leaf in there.items()}
    file = torch_writer.save(torch_tensors("googlenet", unflatten_dict(arrays)), tmp_path / "googlenet-1378be20.pth")
    flags = ["--config.model.options=width_divisor=8" + options]
    assert restore_weights(str(file), "googlenet", overrides=flags).experiment.config.data.mean[0] == mean


def test_a_thousand_classes_have_imagenets_names(tmp_path):
    there = places("resnet50", channels=3, classes=1000, stage_sizes=(1,), features=2)
    file = torch_writer.save(resnet(there), tmp_path / "w.pth")
    assert Predictor.from_weights(str(file), "resnet50", overrides=[SMALL]).class_names[281] == "tabby"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("", {}, r"--model=NAME is missing; name the weights' network"),
        ("resnet51", {}, "unknown model 'resnet51'"),
        ("cifar_resnet14", {}, "these are not the weights of cifar_resnet14"),
        ("cifar_resnet8", {"attention": "se"}, "it lacks stage1_block1/attention"),
        ("cifar_resnet8", {"batch_size": 0}, "--batch-size=0: must be at least 1"),
        ("cifar_resnet8", {"overrides": ["--config.data.men=1"]}, "there is no such key"),
        ("cifar_resnet8", {"overrides": ["--config.data.name=digits"], "data": True},
         "the weights have 7 classes, but digits has 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(model, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        restore_weights(cifar_file(tmp_path, classes=7), model, **options)


@pytest.mark.parametrize(("channels", "count"), [(1, "1 channel"), (4, "4 channels")])
def test_weights_of_other_channels_ask_for_their_normalisation(channels, count, tmp_path):
    there = places("resnet50", channels=channels, classes=7, stage_sizes=(1,), features=2)
    file = str(torch_writer.save(resnet(there), tmp_path / "w.pth"))
    with pytest.raises(
        UserError, match=rf"w\.pth.* take images with {count}, unlike data.mean=.* and data.std=.*std=\.\.\.$"
    ):
        restore_weights(file, "resnet50", overrides=[SMALL])
    with pytest.raises(UserError, match=r"channels?, unlike data\.std=\(0\.229, 0\.224, 0\.225\); give"):
        restore_weights(file, "resnet50", overrides=[SMALL, "--config.data.mean=0.5"])
    given = [SMALL, "--config.data.mean=0.5", "--config.data.std=0.25"]
    assert restore_weights(file, "resnet50", overrides=given).experiment.image_shape == (224, 224, channels)


def test_an_attention_of_the_file_is_not_left_out_in_silence(tmp_path):
    there = places("resnet50", attention="se", channels=3, classes=7, stage_sizes=(1,), features=16)
    from hga_flax.pretrained.torch_weights import _torch_shape, peer_name

    names = {peer_name("seresnet50", path[1:]): _torch_shape(path, leaf.shape) for path, leaf in there.items()}
    tensors = {name: np.ones(shape, np.float32) for name, shape in names.items()}
    file = str(torch_writer.save(tensors, tmp_path / "se.pth"))
    options = ["--config.model.options=stage_sizes=(1,), features=16"]
    with pytest.raises(UserError, match=r"no place for layer1\.0\.se\.fc\d.*set --model, --attention"):
        restore_weights(file, "resnet50", overrides=options)
    for model, attention in (("resnet50", "se"), ("seresnet50", "")):
        restored = restore_weights(file, model, attention, overrides=options)
        assert restored.experiment.config.model.attention == "se"


@pytest.mark.medium
@pytest.mark.parametrize(("decay", "kind"), [(0.0, "raw"), (0.9, "ema")])
def test_a_runs_folder(tmp_path, decay, kind):
    train(tiny.config(training__steps=2, training__ema_decay=decay), str(tmp_path))
    restored, run = restore_weights(str(tmp_path)), restore_workdir(str(tmp_path))
    assert restored.weights == run.weights == kind and restored.origin.endswith("its moving average") == (kind == "ema")
    for ours, theirs in zip(*map(jax.tree.leaves, (restored.variables, run.variables)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert restored.experiment.dataset.info == run.experiment.dataset.info
    assert restored.step == int(restored.state.step) == 2 and restore_weights(f"{tmp_path}@latest").step == 2


@pytest.mark.medium
def test_a_run_of_a_grey_vgg_takes_its_own_weights(tmp_path):
    vgg = {"model__name": "vgg11", "model__attention": "none", "model__attention_options": ""}
    small = {"model__options": "stage_sizes=(1,), features=2, hidden=4", "training__steps": 1, "data__image_size": 32}
    train(tiny.config(**vgg | small), str(tmp_path))
    assert restore_weights(str(tmp_path)).experiment.dataset.info.channels == 1


def test_options_stay_with_the_network_and_attention_that_they_belong_to():
    def named(model, attention):
        config = base_config()
        config.model.update({"name": "cifar_resnet20", "options": "shortcut='B'"})
        config.model.update({"attention": "hga", "attention_options": "mfe_act='relu'"})
        from_weights._name_network(config, model, attention, set())
        return config.model.attention_options

    assert named("cifar_resnet20", "hga") == named("", "") == "mfe_act='relu'"
    assert named("", "se") == named("cifar_resnet20", "se") == named("cifar_resnet32", "hga") == ""


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            DatasetInfo("x", 10, 3, CIFAR10[::-1]),
            "label 0 is 'truck' there and 'airplane' in the weights",
        ),
        (
            DatasetInfo("x", 10, 3, tuple(sorted({*CIFAR10, "plane", "car"} - {"airplane", "automobile"}))),
            "x has 10 classes, the weights 10: it adds 'car', 'plane' and it lacks 'airplane', 'automobile'",
        ),
        (DatasetInfo("x", 10, 1, tuple("0123456789")), "take images with 3 channels, but those of digits have 1"),
    ],
)
def test_other_classes_and_channels_than_those_of_the_weights_are_refused(info, message, monkeypatch):
    config = base_config()
    config.data.name = "digits"
    monkeypatch.setattr(from_weights, "dataset_info", lambda name, directory: info)
    source = Source("x", {}, peer="pytorch_resnet_cifar10/resnet20")
    with pytest.raises(UserError, match=message.replace("x has", "digits has")):
        from_weights._dataset(config, source, 10, 3, None, data=True)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (tuple("abcdefghij"), "warning: digits has other class names than the weights, taken in this order: 'a' is "),
        (tuple(f"n0000000{i}" for i in range(10)), ""),
        ((), ""),
    ],
)
def test_other_names_for_the_same_classes_are_taken_in_order_aloud(names, said, monkeypatch, capsys):
    config = base_config()
    config.data.name = "digits"
    monkeypatch.setattr(from_weights, "dataset_info", lambda name, directory: DatasetInfo("x", 10, 3, names))
    source = Source("x", {}, peer="pytorch_resnet_cifar10/resnet20")
    assert from_weights._dataset(config, source, 10, 3, None, data=True).class_names == names
    error = capsys.readouterr().err
    assert error.startswith(said) and bool(error) == bool(said)
