import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from hga_flax.errors import UserError
from hga_flax.models import create_model
from hga_flax.pretrained.torch_weights import _torch_shape, peer_name, variables_from_torch
from hga_flax.processes.mesh import to_devices
from hga_flax.training import initial_weights as w
from hga_flax.training.restore import restore_workdir
from hga_flax.training.trainer import train
from tests.commands import ROOT
from tests.goldens_models import golden_input, rule_tensor
from tests.training import tiny

TINY_RESNET = "stage_sizes=(1, 1), features=8"  # with torchvision's names


def start(name, **overrides):
    """A configuration with `init.weights`."""
    return tiny.config(**{"init__weights": str(name)} | overrides)


def places(name="cifar_resnet8", attention="none", channels=1, classes=10, **options):
    if name == "cifar_resnet8":
        options = {"features": 4} | options
    model = create_model(name, num_classes=classes, **{"attention": attention} | options)
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images.shape)))
    return flatten_dict({kind: variables[kind] for kind in ("params", "batch_stats")})


def source(there):
    """What a file with these arrays would hold: each one's values tell it from the others."""
    arrays = {path: np.full(leaf.shape, i + 1.0, np.float32) for i, (path, leaf) in enumerate(there.items())}
    return w.Source("FILE", arrays)


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.medium
def test_a_run_of_ours(run):
    network = places(attention="hga")
    found = w.fit(w.read_source(start(run), network), network, "cifar_resnet8")
    state = restore_workdir(str(run)).state
    expected = flatten_dict({"params": state.params, "batch_stats": state.batch_stats})
    assert list(found.loaded) == list(network) and not found.fresh and not found.unused
    for path, array in expected.items():
        np.testing.assert_array_equal(found.loaded[path], array)
    assert found.origin == f"step 3 of {run}, cifar_resnet8 with attention hga"
    for checkpoint in ("latest", "3"):
        assert set(w.read_source(start(f"{run}@{checkpoint}"), network).arrays) == set(network)


def test_what_differs_stays_fresh():
    there, here = places(attention="se"), places(attention="hga", classes=5)
    found = w.fit(source(there), here, "cifar_resnet8")
    head = [f"classifier/{leaf}" for leaf in ("bias", "kernel")]
    assert set(found.fresh) == {w._name(p) for p in here if "attention" in p} | set(head)
    assert set(found.unused) == {w._name(p) for p in there if "attention" in p} | set(head)
    shared = {path for path in here if "attention" not in path and "classifier" not in path}
    assert set(found.loaded) == shared
    for path in shared:
        assert (found.loaded[path] == source(there).arrays[path]).all()
    text = found.text()
    assert all(f"\n  {name}\n" in text for name in (*found.fresh, *found.unused, *map(w._name, found.loaded)))
    rows = dict(found.rows())
    assert rows["loaded"].endswith("more") and rows["fresh"].startswith(f"{len(found.fresh)} arrays")


def test_an_attention_is_taken_whole_or_not_at_all():
    """CBAM's channel gate has SE's names and shapes but for the biases."""
    there, here = places(attention="se", attention_options={"bias": False}), places(attention="cbam")
    shared = [path for path in here if "attention" in path and path in there]
    assert shared and all(here[path].shape == there[path].shape for path in shared)
    assert not [path for path in w.fit(source(there), here, "x").loaded if "attention" in path]


def test_a_trained_attention_goes_on_acting_behind_an_identity_start():
    there, here = places(attention="se"), places(attention="se", attention_options={"identity_start": True})
    found = w.fit(source(there), here, "x")
    shares = [path for path in here if path[-1] == "identity_start_share"]
    assert len(shares) == 3 and not found.fresh
    assert all((found.loaded[path] == 1).all() for path in shares)
    again = w.fit(source(here), here, "x").loaded  # and with a share of its own, keeps that
    assert all((again[path] == source(here).arrays[path]).all() for path in here)
    fresh = w.fit(source(places()), here, "x")
    assert not [path for path in fresh.loaded if "attention" in path]
    with pytest.raises(UserError, match="only a share of its attention takes effect, and here all of it would; set id"):
        w.fit(source(here), there, "x")
    assert not [path for path in w.fit(source(here), places(attention="gc"), "x").loaded if "attention" in path]


@pytest.mark.parametrize(("there", "here"), [(3, 1), (1, 3), (1, 4), (4, 1)])
def test_a_stem_for_other_channels_answers_a_grey_image_as_before(there, here):
    name, path = "cifar_resnet8", ("params", "stem_conv", "kernel")
    rgb = np.random.RandomState(0).standard_normal(places(channels=there)[path].shape)
    found = w.fit(source(places(channels=there)), places(channels=here), name)
    assert len(found.notes) == 1 and found.notes[0].startswith("stem_conv/kernel: its ")
    kernel, _ = w._fit_channels(rgb, places(channels=here)[path].shape)
    np.testing.assert_allclose(kernel.sum(axis=2), rgb.sum(axis=2), rtol=1e-6)
    half = rgb.astype(np.float16)  # as many files store it; the sums have more digits
    kernel, _ = w._fit_channels(half, places(channels=here)[path].shape)
    np.testing.assert_allclose(kernel.sum(axis=2), half.astype(np.float64).sum(axis=2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (
            {"features": 8},
            r"^init\.weights=FILE: these are not the weights of ours: stage1_block1/conv1/kernel \[3, 3, 8, 8\] "
            r"instead of \[3, 3, 4, 4\], .*; set config\.model to the network that they belong to$",
        ),
        ({"channels": 3, "here": 4}, r"stem_conv/kernel \[3, 3, 3, 4\] instead of \[3, 3, 4, 4\]"),
        (
            {"name": "cifar_preact_resnet8", "features": 4},
            r"stage2_block1/downsample_norm/bias missing, .* and \d+ more",
        ),
        ({"name": "cifar_resnet14", "features": 4}, r": stage1_block2/conv1/kernel has no place in it, "),
    ],
)
def test_another_network_is_one_line(there, message):
    here = places(channels=there.pop("here", 1))
    with pytest.raises(UserError, match=message):
        w.fit(source(places(**there)), here, "ours")


def test_values_that_are_not_finite_are_refused():
    there = source(places())
    there.arrays["params", "stem_conv", "kernel"][0] = np.nan
    with pytest.raises(UserError, match=r"values that are not finite, .*: stem_conv/kernel"):
        w.fit(there, places(), "ours")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet8", {}),
        ("resnet50", {"stage_sizes": (1,)}),
        ("densenet121", {"block_sizes": (1,)}),
        pytest.param("googlenet", {"aux_logits": True}, marks=pytest.mark.slow),
    ],
)
def test_the_head_is_what_depends_on_the_number_of_classes(name, options):
    seven, ten = (places(name, channels=3, classes=classes, **options) for classes in (7, 10))
    differ = {path for path in seven if seven[path].shape != ten[path].shape}
    assert differ == {path for path in seven if w.HEAD in path} and differ


def test_the_first_convolution_of_vgg_takes_other_channels():
    options = {"stage_sizes": (1,), "features": 4, "hidden": 8}
    grey, colour = (places("vgg11_bn", channels=channels, **options) for channels in (1, 3))
    found = w.fit(source(colour), grey, "vgg11_bn")
    assert found.notes == ["stage1/conv1/kernel: its 3 input channels summed to 1"] and not found.fresh
    stems = [path for path in colour if w.is_stem(path) and len(colour[path].shape) == 4]
    assert [path for path in colour if colour[path].shape != grey[path].shape] == stems


def test_the_shares_of_an_attention_without_other_parameters_are_loaded():
    there = places(attention="ge", attention_options={"mlp": False, "identity_start": True})
    shares = {path for path in there if path[-1] == w.SHARE}
    found = w.fit(source(there), there, "ours")
    assert shares and shares <= found.loaded.keys() and not found.fresh + found.unused
    without = {path: leaf for path, leaf in there.items() if path not in shares}
    assert {path for path in there if path not in w.fit(source(without), there, "ours").loaded} == shares


def test_an_auxiliary_head_may_be_missing():
    whole = places("googlenet", channels=3, aux_logits=True)
    main = {path: leaf for path, leaf in whole.items() if not path[1].startswith("auxiliary")}
    found = w.fit(source(main), whole, "googlenet")
    assert found.fresh and all(name.startswith("auxiliary") for name in found.fresh)
    assert set(w.fit(source(whole), main, "googlenet").unused) == set(found.fresh)


def resnet(there, prefix="", shift=0.0):
    """A state dict by torchvision's names."""
    named = {peer_name("resnet50", path[1:]): _torch_shape(path, leaf.shape) for path, leaf in there.items()}
    return {prefix + name: (rule_tensor(name, shape) + shift).astype(np.float32) for name, shape in named.items()}


SMALL = dict(stage_sizes=(1,), features=2)


def resnet_start(given):
    return start(given, model__name="resnet50", model__options="stage_sizes=(1,), features=2")


def logits(model, variables, images):
    return np.asarray(jax.jit(lambda v: model.apply(v, images, train=False))(variables), np.float64)


def load(path, attention_options, classes, **overrides):
    """The network of a configuration with `init.weights`, and its initial variables."""
    c = start(path, model__attention_options=attention_options, **overrides)
    model, state, _ = tiny.build(c, tiny.mesh(), (32, 32, 3), classes)
    state, found = w.start_from(c, state, tiny.mesh())
    return model.clone(axis_name=None), {"params": state.params, "batch_stats": state.batch_stats}, found


def test_hga_added_to_a_pytorch_file_leaves_its_logits(tmp_path):
    plain = create_model("resnet50", num_classes=7, stage_sizes=(1, 1), features=8)
    tensors = {"bn1.num_batches_tracked": np.zeros(())}
    for path, leaf in places("resnet50", channels=3, classes=7, stage_sizes=(1, 1), features=8).items():
        name = peer_name("resnet50", path[1:])
        tensors[name] = rule_tensor(name, list(_torch_shape(path, leaf.shape)))
    file = write_safetensors(tmp_path / "resnet.safetensors", tensors)
    network = {"model__name": "resnet50", "model__options": TINY_RESNET}
    model, variables, found = load(file, "identity_start=True, kernels=(1, 3), bins=(1, 2)", 7, **network)
    images = jnp.asarray(golden_input(), jnp.float32)[:, :32, :32]
    expected = logits(plain, variables_from_torch("resnet50", tensors, plain), images)
    np.testing.assert_allclose(logits(model, variables, images), expected, rtol=1e-5, atol=1e-5)
    assert found.fresh and all("attention" in name for name in found.fresh) and not found.unused
    assert found.origin.endswith("read as torchvision's or timm's resnet50")


@pytest.mark.slow
def test_hga_added_to_resnet50_gives_torchvisions_logits(tmp_path):
    case = json.loads((ROOT / "tests/golden/models.json").read_text())["tv:resnet50"]
    tensors = {name: rule_tensor(name, shape) for name, shape in case["tensors"].items()}
    file = write_safetensors(tmp_path / "resnet50.safetensors", tensors)
    network = {"model__name": "resnet50", "model__options": ""}
    model, variables, found = load(file, "identity_start=True", 1000, **network)
    assert len([name for name in found.fresh if name.endswith("identity_start_share")]) == 16 and not found.unused
    ours = logits(model, variables, jnp.asarray(golden_input(), jnp.float32))
    golden = np.asarray(case["logits"])
    assert np.linalg.norm(ours[:, : golden.shape[1]] - golden) / np.linalg.norm(golden) < 1e-3
    assert ours.argmax(axis=1).tolist() == case["argmax"]


@pytest.mark.medium
def test_a_resumed_run_does_not_ask_for_the_source_again(run, tmp_path, capsys):
    copy, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(run, copy)
    c = start(copy, model__attention="none", training__steps=3, optimizer__freeze=("stem*",))
    train(c, str(workdir))
    text = (workdir / "initial_weights.txt").read_text()
    out = capsys.readouterr().out
    assert out.count("initial weights") == 1 and "initialised from" in out and f"from step 3 of {copy}" in text
    ours, theirs = (restore_workdir(str(folder)).state.params for folder in (workdir, copy))
    same = {
        name: jax.tree.map(lambda a, b: bool((a == b).all()), ours[name], theirs[name])
        for name in ("stem_conv", "stem_norm", "classifier")
    }
    assert all(jax.tree.leaves([same["stem_conv"], same["stem_norm"]])) and not same["classifier"]["kernel"]
    shutil.rmtree(copy)
    with c.unlocked():
        c.training.steps = 6
    train(c, str(workdir))
    assert "resuming" in (out := capsys.readouterr().out) and "initial weights" not in out and "initialised" not in out
    with c.unlocked():
        c.training.steps, c.optimizer.freeze = 9, ()
    train(c, str(workdir))
    assert "changed: optimizer.freeze: ('stem*',) -> ()" in capsys.readouterr().out
    thawed = restore_workdir(str(workdir), "latest").state.params
    assert (thawed["stem_conv"]["kernel"] != ours["stem_conv"]["kernel"]).any()
    with pytest.raises(UserError, match=r"belongs to another run: there init\.weights is '.*', here ''"):
        train(tiny.config(model__attention="none"), str(workdir))


@pytest.mark.slow
def test_an_average_begins_as_the_loaded_weights(run):
    c = start(run, training__ema_decay=0.9)
    mesh = tiny.mesh()
    _, state, step = tiny.build(c, mesh)
    state, _ = w.start_from(c, state, mesh)
    loaded = restore_workdir(str(run)).variables
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    step(state, next(to_devices(iter([tiny.batch()]), mesh)))  # which consumes each array of the state once


def test_a_negative_variance_is_refused():
    network = places()
    given = source(network)
    given.arrays["batch_stats", "stem_norm", "var"][0] = -1
    with pytest.raises(UserError, match=r"values that are not finite, or variances below 0: stem_norm/var$"):
        w.fit(given, network, "cifar_resnet8")
