"""What a pickle may ask for, and what comes of it; for whole files see test_torch_contents.py."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from hga_flax.errors import UserError
from hga_flax.pretrained.torch_files import open_weights, read_torch_file
from hga_flax.pretrained.torch_pickle import StandIn, Unpickler
from tests import torch_writer
from tests.torch_writer import Global, Reduced

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5], np.float16),
    "count": np.array(3, np.int64),
    "double": np.array([1 / 3]),
}


def check(tensors):
    assert set(tensors) == set(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


@pytest.mark.parametrize("rebuild", ["_rebuild_tensor", "_rebuild_tensor_v2"])
@pytest.mark.parametrize("view", [False, True])
def test_the_older_layout(rebuild, view, tmp_path):
    check(read_torch_file(torch_writer.save_legacy(ARRAYS, tmp_path / "w.pth", rebuild, view)))


def test_tensors_with_attributes_of_their_own(tmp_path):
    def tensor(value):
        plain = Reduced(Global("torch._utils", "_rebuild_parameter_with_state"), (value, True, {}, {"tag": 1}))
        return Reduced(
            Global("torch._tensor", "_rebuild_from_type_v2"),
            (
                Global("torch._utils", "_rebuild_parameter"),
                Global("torch.nn", "Parameter"),
                (plain, False, {}),
                {"x": 1},
            ),
        )

    check(read_torch_file(torch_writer.save({k: tensor(v) for k, v in ARRAYS.items()}, tmp_path / "w.pth")))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_numpy_that_pickle_wrote(protocol, tmp_path):
    arrays = ARRAYS | {"fortran": np.asfortranarray(ARRAYS["matrix"]), "big": ARRAYS["double"].astype(">f8")}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=protocol))
    tensors = read_torch_file(tmp_path / "w.pkl")
    np.testing.assert_array_equal(tensors.pop("fortran"), ARRAYS["matrix"])
    np.testing.assert_array_equal(tensors.pop("big"), ARRAYS["double"])
    check(tensors)


def test_a_small_tensor_that_repeats_one_value(tmp_path):
    program = "(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI1\ntQ"
    program += "I0\n(I64\nt(I0\nttRs."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", np.float32(2).tobytes())
    np.testing.assert_array_equal(read_torch_file(tmp_path / "w.pth")["w"], np.full(64, 2, np.float32))


def unpickled(value):
    return Unpickler(io.BytesIO(torch_writer._pickled(value)[0]), {}).load()


def test_a_stand_in_keeps_what_it_is_given_and_does_nothing():
    made = unpickled(Reduced(Global("os", "system"), ("true",), {"lr": 1}, items={"a": 2}))
    assert isinstance(made, StandIn) and made.origin == "os.system"
    assert (made.arguments, made.items, made.state) == (("true",), {"a": 2}, {"lr": 1})
    assert not hasattr(made, "__dict__") and not callable(made)
    assert unpickled(Global("os", "system")) is not unpickled(Global("os", "system"))  # each file has its own


@pytest.mark.parametrize(
    "value",
    [
        Reduced(Global("torch._utils", "_rebuild_tensor_v2"), (Reduced(Global("x", "Y")), 0, (1,), (1,))),
        Reduced(Global("torch._utils", "_rebuild_parameter"), ({},)),
        Reduced(Global("torch", "FloatStorage"), (4,)),
        Reduced(Global("torch", "FloatStorage"), (4,), new=True),
        Reduced(Global("torch._tensor", "_rebuild_from_type_v2"), (Global("os", "system"), 1, ("true",), {})),
        Reduced(Reduced(Global("os", "getcwd")), ()),  # what a stand-in made must not be called
        Reduced(Global("numpy._core.multiarray", "_reconstruct"), (), ((1,), Global("numpy", "dtype"), False, b"x")),
        Reduced(
            Global("numpy._core.multiarray", "_reconstruct"),
            (),
            ((1,), Reduced(Global("numpy", "dtype"), ("O8",)), False, [1]),
        ),
    ],
)
def test_what_makes_no_tensor_is_an_error(value):
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        unpickled(value)


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    """So that an optimizer's state, twice the weights, stays where it is."""
    with open_weights(torch_writer.save({"model": ARRAYS, "optimizer": dict(ARRAYS)}, tmp_path / "w.pth")) as contents:
        leaves = {leaf.container + leaf.name: leaf.tensor for leaf in contents.leaves}
        leaves["model.matrix"].array()
        assert leaves["model.matrix"].storage._data is not None
        assert leaves["optimizer.matrix"].storage._data is None


def test_quantised_and_nameless_tensors_are_named_as_what_they_are(tmp_path):
    """A quantised tensor's storage as torch 2.7 pickles it, and `torch.save(tensor)`."""
    storage = "(S'storage'\nctorch\nQInt8Storage\nS'0'\nS'cpu'\nI1\ntQ"
    with zipfile.ZipFile(tmp_path / "q.pth", "w") as archive:
        archive.writestr("archive/data.pkl", f"(dS'w'\nctorch._utils\n_rebuild_qtensor\n({storage}I0\nttRs.")
        archive.writestr("archive/data/0", b"1")
    with pytest.raises(UserError, match=r"it holds quantised tensors \(QInt8Storage\); give the weights that the"):
        read_torch_file(tmp_path / "q.pth")
    torch_writer.save(ARRAYS["matrix"], tmp_path / "one.pth")
    with pytest.raises(UserError, match="it holds one tensor without a name; give a state dict"):
        read_torch_file(tmp_path / "one.pth")
