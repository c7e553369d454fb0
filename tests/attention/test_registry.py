import functools
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import attention_names, attention_options, create_attention, register_attention, registry
from hga_flax.attention.hga import HGA
from hga_flax.attention.registry import attention_factory, check_types, fits
from hga_flax.attention.se import SqueezeExcitation
from hga_flax.attention.sk import SelectiveKernel
from hga_flax.models import create_model
from tests.reference import perturbed, sample

CHANNELS = 64
STARTS = {"identity_start": (True, {})}
# For each option another value than the default, and what both sides of the comparison need beside it.
HGA_OPTIONS = {
    "reduced_channels": (16, {}),
    "kernels": ((3,), {}),
    "bins": ((1, 2), {}),
    "groups": (8, {"group_size": 1}),
    "group_size": (4, {}),
    "reduction": (2, {}),
    "excitation": ("concat", {}),
    "mfe": (False, {}),
    "hap": (False, {}),
    "ee": (False, {}),
    "mfe_norm": (True, {}),
    "mfe_act": ("relu", {}),
    "restore": ("features", {"restore_norm": False}),
    "restore_norm": (True, {}),
} | STARTS
ALTERNATIVES = {
    "none": {},
    "hga": HGA_OPTIONS,
    "hga_table2": HGA_OPTIONS | {"mfe_norm": (False, {}), "restore_norm": (False, {})},
    "se": {"ratio": (4, {}), "bias": (False, {}), "min_channels": (8, {})} | STARTS,
    "sk": {"ratio": (1, {}), "min_channels": (8, {}), "dilations": ((1, 3), {}), "groups": (4, {})},
    "eca": {"kernel_size": (5, {}), "circular": (True, {})} | STARTS,
    "cbam": {"ratio": (4, {}), "kernel_size": (3, {}), "bias": (True, {}), "spatial": (False, {})} | STARTS,
    "gc": {"ratio": (4, {}), "fusion": ("add", {}), "pooling": ("mean", {})} | STARTS,
    "ge": {"ratio": (4, {}), "extent": (2, {}), "learned": (True, {}), "mlp": (False, {})} | STARTS,
    "nl": {
        "ratio": (4, {}),
        "scaled": (False, {}),
        "zero_init": (False, {}),
        "identity_start": (True, {"zero_init": False}),  # else it starts as the identity by itself
    },
}
# "form" chooses between two ways to the same result: tests/attention/test_hga.py and tests.goldens compare them.
SAME_RESULT = {"hga": {"form"}, "hga_table2": {"form"}}


@functools.cache
def outputs(name: str, options: tuple) -> list[np.ndarray]:
    """Returns the output on fixed noise, with variables made from their names alone, and for NL as initialised."""
    x = jnp.asarray(sample((2, 8, 4, CHANNELS)), jnp.float32)
    module = create_attention(name, CHANNELS, **dict(options))
    shapes = dict(jax.eval_shape(module.init, jax.random.key(0), x))
    shapes.pop("intermediates", None)
    variables = perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))
    results = [np.asarray(jax.jit(module.apply)(variables, x))]
    if name == "nl":  # zero_init acts at the beginning only
        results.append(np.asarray(jax.jit(module.init_with_output)(jax.random.key(0), x)[0]))
    return results


@pytest.mark.parametrize("name", attention_names())
def test_no_option_is_missing_from_the_table(name):
    assert set(attention_options(name)) == set(ALTERNATIVES[name]) | SAME_RESULT.get(name, set())


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in ALTERNATIVES for option in ALTERNATIVES[name]])
def test_every_option_changes_the_output(name, option):
    value, beside = ALTERNATIVES[name][option]
    assert attention_options(name)[option] != value
    before, after = outputs(name, tuple(beside.items())), outputs(name, (*beside.items(), (option, value)))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", attention_names())
def test_keeps_shape_and_dtype(name):
    x = jnp.asarray(sample((2, 5, 7, 32)), jnp.bfloat16)
    module = create_attention(name, 32, dtype=jnp.bfloat16)
    y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables.get("params", {})))


@pytest.mark.parametrize("name", [name for name in attention_names() if name not in ("none", "sk")])
def test_nothing_is_rounded_to_float32_on_the_way_of_float64(name):
    with jax.enable_x64(True):
        module = create_attention(name, 32, dtype=jnp.float64)
        x = jnp.zeros((2, 6, 6, 32), jnp.float64)
        variables = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64),
            jax.eval_shape(module.init, jax.random.key(0), x),
        )
        program = jax.make_jaxpr(lambda variables, x: module.apply(variables, x))(variables, x)
        assert "f64" in str(program) and "f32" not in str(program)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown attention 'sse'; did you mean 'se'\?; known: none, hga"):
        create_attention("sse", 8)
    with pytest.raises(ValueError, match=r"'se' has no option 'rati'; did you mean 'ratio'\?; it has: ratio, bias"):
        create_attention("se", 8, rati=4)
    with pytest.raises(ValueError, match="unknown attention 'x'; known: none, hga"):
        create_attention("x", 8)
    with pytest.raises(ValueError, match="has no option 'stride'"):  # the block's to give, not the user's
        create_attention("sk", 8, stride=2)


@pytest.mark.parametrize("name", attention_names())
def test_parameters_are_float32_where_jax_is_told_to_use_64_bits(name):
    with jax.enable_x64(True):
        x = jnp.ones((2, 8, 8, 32), jnp.float32)
        module = create_attention(name, 32, **{"identity_start": True} if name not in ("none", "sk") else {})
        y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, variables))} == {jnp.dtype("float32")}


CELL = """
import dataclasses, flax.linen as nn, jax

class Mine(nn.Module):
    channels: int
    ratio: int = {ratio}
    weights: dict = dataclasses.field(default_factory=dict)
    dtype: object = None
    axis_name: str | None = None

    def __call__(self, x, train=False):
        return x * (1 + bool(self.weights))
"""


@pytest.fixture
def cell(monkeypatch):
    """Returns a function that runs a notebook's cell with a class of one's own, and returns the class."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    def run(ratio):
        scope = {"__name__": "__main__"}
        exec(CELL.format(ratio=ratio), scope)
        return scope["Mine"]

    return run


def test_a_notebooks_cell_may_be_run_again_but_no_name_be_taken_twice(cell):
    register_attention("mine", cell(4))
    register_attention("mine", cell(8))
    assert attention_options("mine") == {"ratio": 8, "weights": {}, "identity_start": False}
    np.testing.assert_array_equal(create_attention("mine", 3).apply({}, jnp.ones((1, 2, 2, 3))), 1)
    register_attention("se", SqueezeExcitation)  # which it is
    for other, preset in ((cell(4), {}), (SqueezeExcitation, {"ratio": 4}), (HGA, {})):
        with pytest.raises(ValueError, match=r"^attention 'se' is already registered; choose another name$"):
            register_attention("se", other, **preset)
    assert attention_options("se")["ratio"] == 16


def test_what_could_not_be_created_is_not_registered(cell):
    with pytest.raises(TypeError, match=r"^attention 'mine': Mine has no field 'ratoi'; did you mean 'ratio'"):
        register_attention("mine", cell(4), ratoi=3)
    module = cell("dataclasses.field()")
    with pytest.raises(TypeError, match=r"^attention 'mine': option 'ratio' needs a default$"):
        register_attention("mine", module)
    assert "mine" not in attention_names()
    register_attention("mine", module, ratio=2)
    assert create_attention("mine", 3).ratio == 2


def test_identity_start_may_be_preset_and_is_no_field(cell):
    register_attention("start", SqueezeExcitation, identity_start=True)
    x = jnp.ones((1, 2, 2, 16))
    np.testing.assert_array_equal(create_attention("start", 16).init_with_output(jax.random.key(0), x)[0], x)
    assert attention_options("start")["identity_start"] is True
    for preset, kind in (({"identity_start": "yes"}, "bool"), ({"ratio": "x"}, "int")):
        with pytest.raises(TypeError, match=f"must be of type {kind}"):
            register_attention("wrong", SqueezeExcitation, **preset)
    with pytest.raises(TypeError, match="SelectiveKernel has no field 'identity_start'"):
        register_attention("other", SelectiveKernel, identity_start=True)
    own = type("Own", (SqueezeExcitation,), {"__annotations__": {"identity_start": bool}, "identity_start": True})
    with pytest.raises(TypeError, match="identity_start is an option of every attention; rename the field"):
        register_attention("own", own)


ANNOTATED = """
from __future__ import annotations
from collections.abc import Sequence
from typing import Any
import flax.linen as nn

class Mine(nn.Module):
    channels: int
    on: bool = True
    sizes: Sequence[int] | None = None
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        return x
"""


def test_types_that_are_written_as_text_are_checked(cell, monkeypatch):
    module = types.ModuleType("annotated_here")
    monkeypatch.setitem(sys.modules, "annotated_here", module)
    exec(ANNOTATED, vars(module))
    register_attention("mine", module.Mine)
    create_attention("mine", 3, on=False, sizes=(1, 2))
    for option, value in (("on", "False"), ("sizes", 3)):
        with pytest.raises(ValueError, match=f"option {option}={value!r} must be of type"):
            create_attention("mine", 3, **{option: value})


def test_a_factory_that_drops_the_name_is_refused():
    """And with it the dtype and the mesh axis; the attention would not be counted as one."""
    model = create_model("cifar_resnet8", attention=lambda channels, **given: SqueezeExcitation(channels))
    with pytest.raises(ValueError, match="made a module named 'SqueezeExcitation_0'; it must pass name, "):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_a_function_is_not_registered_but_given():
    with pytest.raises(TypeError, match="'mine' must be a Linen module class with the fields channels, dtype and axis"):
        register_attention("mine", lambda channels, **options: None)
    assert "mine" not in attention_names()


@pytest.mark.parametrize(
    ("declared", "right", "wrong"),
    [
        (int, [0, -3, np.int64(4)], [1.0, True, "1", None, 2**31]),
        (float, [0, 0.5, np.float32(0.5)], [10**400, np.complex64(1), True, "1", float("nan"), float("inf")]),
        (bool, [True], [1, "True", None]),
        (str, ["a"], [1, None]),
        (int | None, [None, 3], ["x", 1.5, False]),
        (Sequence[int], [(), (1, 2), [3]], [1, (1.5,), ("a",), "12"]),
        (Any, [1, "a", None], []),
        (Callable[..., Any], [print], []),
        (tuple[int, float], [(3, 0.5), [3, 1]], [(0.5, 3), (3,), (3, 0.5, 1), 3]),
        (tuple[int, ...], [(), (3, 4, 5)], [(3, 0.5)]),
        (typing.Sequence, [(), ["a"]], [3]),
    ],
)
def test_values_fit_their_declared_type(declared, right, wrong):
    assert all(fits(value, declared) for value in right)
    assert not any(fits(value, declared) for value in wrong)


def test_the_message_names_option_value_and_type():
    with pytest.raises(ValueError, match=r"^attention 'hga': option kernels=7 must be of type Sequence\[int\]$"):
        check_types("attention 'hga'", HGA, {"kernels": 7})
    with pytest.raises(ValueError, match=r"option mfe_act=1 must be of type str \| None$"):
        check_types("attention 'hga'", HGA, {"mfe_act": 1})
    with pytest.raises(ValueError, match=r"option reduction='x' must be of type int$"):
        check_types("attention 'hga'", HGA, {"reduction": "x"})


@pytest.mark.parametrize("name", attention_names())
def test_every_default_has_its_declared_type_and_no_option_takes_everything(name):
    options = attention_options(name)
    attention_factory(name, **options)
    for option in options:
        with pytest.raises(ValueError, match=f"option {option}="):
            attention_factory(name, **{option: {"no": "option is a dictionary"}})


def test_a_module_of_a_compact_method_is_named_as_usual():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return create_attention("se", channels=16, name="gate")(x)

    shapes = jax.eval_shape(Block().init, jax.random.key(0), jnp.ones((2, 4, 4, 16)))
    assert list(shapes["params"]) == ["gate"]


@pytest.mark.parametrize("name", attention_names())
def test_integers_are_refused_and_a_batch_may_be_empty(name):
    module, x = create_attention(name, 16), jnp.ones((2, 4, 4, 16))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert jax.jit(module.apply)(variables, x[:0]).shape == (0, 4, 4, 16)
    if name != "none":
        with pytest.raises(ValueError, match=r"\(16\) needs a floating-point map, not int32"):
            module.apply(variables, x.astype(jnp.int32))


@pytest.mark.parametrize("name", [name for name in attention_names() if name != "none"])
def test_the_batch_may_be_symbolic_as_in_an_exported_network(name):
    module = create_attention(name, 16)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 16)))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(lambda x: module.apply(variables, x)))
    (y,) = exported(jax.ShapeDtypeStruct((batch, 8, 8, 16), jnp.float32)).out_avals
    assert str(y.shape) == "(batch, 8, 8, 16)"
