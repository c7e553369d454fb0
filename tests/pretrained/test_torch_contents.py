"""Files as training programs write them. Some are by PyTorch (tests/golden/torch), the others in its layouts."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hga_flax.errors import UserError
from hga_flax.models import create_model
from hga_flax.pretrained.torch_files import open_weights
from hga_flax.pretrained.torch_weights import _torch_shape, find_peer, peer_name
from tests import torch_writer
from tests.commands import ROOT
from tests.goldens_models import rule_tensor
from tests.torch_writer import Global, Reduced

FILES = ROOT / "tests/golden/torch"


def _places():
    model = create_model("resnet50", num_classes=3, stage_sizes=(1,), features=2)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    return flatten_dict({kind: variables[kind] for kind in ("params", "batch_stats")})


PLACES = _places()


def tensors_of(shift):
    """A ResNet's state dict by torchvision's names, made by the goldens' rule; `shift` tells two of them apart."""
    shapes = {peer_name("resnet50", path[1:]): _torch_shape(path, leaf.shape) for path, leaf in PLACES.items()}
    return {name: (rule_tensor(name, shape) + shift).astype(np.float32) for name, shape in shapes.items()}


RAW, AVERAGE = tensors_of(0), tensors_of(1)


def begins(prefix, tensors=RAW):
    return collections.OrderedDict((prefix + name, value) for name, value in tensors.items())


def choose(path, wanted=""):
    with open_weights(path) as contents:
        found = find_peer("resnet50", contents, PLACES, wanted)
        return found.choice, found.choice.arrays(), contents.describe()


def check(arrays, expected):
    assert set(expected) <= set(arrays)
    for name, value in expected.items():
        np.testing.assert_array_equal(arrays[name], value)


@pytest.mark.parametrize(
    ("name", "expected", "label"),
    [
        ("training_ema.pth", AVERAGE, "model_ema"),
        ("training_ema_legacy.pth.tar", AVERAGE, "state_dict_ema"),
        ("pickled.pkl", RAW, ""),
        ("shared_views.pt", AVERAGE, "net"),
    ],
)
def test_what_pytorch_wrote(name, expected, label):
    choice, arrays, _ = choose(FILES / name)
    check(arrays, expected)
    assert choice.label == label and choice.score == (len(RAW), len(RAW))
    assert not [name for name in arrays if "num_batches" in name or "n_averaged" in name]


def test_an_average_is_taken_and_said_and_the_other_can_be_had():
    choice, _, described = choose(FILES / "training_ema.pth")
    assert choice.note() == "model_ema (an average of the weights); as many fit under model: FILE@model selects those"
    count = len(RAW) + 1
    assert described.startswith(
        f"model ({count} tensors), optimizer (2 tensors), lr_scheduler, epoch, args (argparse.Namespace), "
        f"model_ema ({count} tensors); in "
    )
    choice, arrays, _ = choose(FILES / "training_ema.pth", "model")
    check(arrays, RAW)
    assert choice.label == "model" and choice.note() == ""
    with pytest.raises(UserError, match="nothing under 'net' fits; it has model "):
        choose(FILES / "training_ema.pth", "net")


OPTIMIZER = {"state": {0: {"momentum_buffer": np.ones(3, np.float32)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
NAMESPACE = Reduced(
    Global("argparse", "Namespace"), (), {"lr": 0.1, "device": Reduced(Global("torch", "device"), ("x",))}
)
BESIDE = {"epoch": 3, "args": NAMESPACE, "optimizer": OPTIMIZER, "best": np.float32(3).item()}
COUNTER = Reduced(Global("collections", "Counter"), ({30: 1},))
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "net", "network", "model_ema", "ema_state_dict", "state_dict_ema",
    "params", "weights", "generator", "my model",
)  # fmt: skip
PREFIXES = (
    "module.", "model.", "backbone.", "encoder.", "net.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
    "model.backbone.", "module.encoder_q.", "my.own.net_2.", "0.",
)  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper, tmp_path):
    for save in (torch_writer.save, torch_writer.save_legacy):
        for value in (RAW, {"inner": RAW}, [RAW], begins("module.")):
            choice, arrays, _ = choose(save(BESIDE | {wrapper: value, "scheduler": COUNTER}, tmp_path / "w.ckpt"))
            check(arrays, RAW)
            assert choice.label.startswith(wrapper) and len(arrays) == len(RAW) and not choice.others


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix, tmp_path):
    beside = {"criterion.weight": np.ones(3, np.float32)}  # of a module beside the network
    for value in (begins(prefix), {"state_dict": begins(prefix)} | BESIDE, begins(prefix) | beside):
        _, arrays, _ = choose(torch_writer.save(value, tmp_path / "W.PTH"))
        check(arrays, RAW)
        assert set(arrays) - set(RAW) <= {"criterion.weight"}


def test_wrappers_of_modules_within_names(tmp_path):
    inside = {name.replace("layer1.0.", "layer1.module.0._orig_mod."): value for name, value in RAW.items()}
    _, arrays, _ = choose(torch_writer.save(inside, tmp_path / "w.pth"))
    check(arrays, RAW)


def test_names_that_would_be_the_same_without_their_wrapper_are_kept_apart(tmp_path):
    file = torch_writer.save({**begins("net."), **begins("module.net.", AVERAGE)}, tmp_path / "w.pth")
    choice, arrays, _ = choose(file)
    check(arrays, RAW)
    assert choice.label == "net" and choice.others == ("module.net",)
    check(choose(file, "module.net")[1], AVERAGE)


def test_safetensors_go_the_same_way(tmp_path):
    header, data = {}, b""
    for name, tensor in begins("model.backbone.").items():
        raw = tensor.tobytes()
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path = tmp_path / "weights"  # and whatever the file is called
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    choice, arrays, _ = choose(path)
    check(arrays, RAW)
    assert choice.label == "model.backbone"


@pytest.mark.parametrize(
    ("raw", "average", "taken"),
    [
        ("model", "ema", "ema"),
        ("params", "params_ema", "params_ema"),
        ("net", "swa_state_dict", "swa_state_dict"),
        ("online", "avg_model", "avg_model"),
        ("student", "teacher", "student"),  # not known to be an average: the first
    ],
)
def test_which_of_two_is_taken(raw, average, taken, tmp_path):
    choice, arrays, _ = choose(torch_writer.save({raw: RAW, average: AVERAGE}, tmp_path / "w.pth"))
    assert choice.label == taken and len(choice.others) == 1
    check(arrays, RAW if taken == raw else AVERAGE)


def test_an_optimizer_s_moments_are_no_weights(tmp_path):
    """Adam's have the names of the weights, and exp_avg is no average of them."""
    moments = {"exp_avg": {k: 0 * v for k, v in RAW.items()}, "exp_avg_sq": {k: 0 * v for k, v in RAW.items()}}
    choice, arrays, _ = choose(torch_writer.save({"optimizer": moments, "model": RAW}, tmp_path / "w.pth"))
    check(arrays, RAW)
    assert choice.label == "model" and not choice.is_average and choice.others == ()
    choice, _, _ = choose(torch_writer.save({"optimized": RAW, "original": AVERAGE}, tmp_path / "o.pth"))
    assert choice.label == "optimized" and choice.others == ("original",)


def test_an_average_without_statistics_is_no_network(tmp_path):
    partial = {name: value for name, value in AVERAGE.items() if "running" not in name}
    check(choose(torch_writer.save({"ema": partial, "model": RAW}, tmp_path / "w.pth"))[1], RAW)


def test_of_two_networks_the_one_of_the_right_shapes(tmp_path):
    wider = {name: np.ones([2 * n for n in value.shape], np.float32) for name, value in RAW.items()}
    check(choose(torch_writer.save({"teacher": wider, "student": RAW}, tmp_path / "w.pth"))[1], RAW)


def test_a_dictionary_of_a_class_of_its_own(tmp_path):
    """As EasyDict, yacs and others are written: made empty, then filled."""
    easy = Reduced(Global("easydict", "EasyDict"), (), {"x": 1}, new=True, items={"net": RAW})
    check(choose(torch_writer.save({"all": easy}, tmp_path / "w.pth"))[1], RAW)


def test_parameters_in_the_place_of_tensors(tmp_path):
    parameters = {
        name: Reduced(Global("torch._utils", "_rebuild_parameter"), (value, True, collections.OrderedDict()))
        for name, value in RAW.items()
    }
    check(choose(torch_writer.save(parameters, tmp_path / "w.pth"))[1], RAW)


def test_cycles_and_depth_end(tmp_path):
    endless = {"state": RAW}
    endless["self"] = endless
    check(choose(torch_writer.save(endless, tmp_path / "w.pth"))[1], RAW)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3, "args": NAMESPACE}, r"it holds no tensors; it has epoch, args \(argparse\.Namespace\)$"),
        ([], "it holds no tensors; it has no named entries"),
        (3, "it holds no tensors"),
        (
            {"net": Reduced(Global("nets", "Net"), (), {"_modules": {}, "_parameters": {}, "training": True})},
            r"it holds a whole pickled network \(nets\.Net\), not its weights; .*torch\.save\(torch\.load\(FILE",
        ),
    ],
)
def test_a_file_without_weights_says_what_it_has(value, message, tmp_path):
    for save in (torch_writer.save, torch_writer.save_legacy):
        with pytest.raises(UserError, match=message):
            choose(save(value, tmp_path / "w.pth"))
