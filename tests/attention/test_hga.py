import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_flax.attention import HGA, create_attention
from tests import goldens
from tests.attention import naive


def random_variables(module, x, seed=1):
    """Initial variables, all replaced by random ones (a BatchNorm at its start would hide mistakes)."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    random = np.random.RandomState(seed)

    def draw(path, leaf):
        n = random.standard_normal(leaf.shape)
        if path[-1].key == "var":
            return 1 + 0.5 * np.abs(n)
        if path[-1].key in ("mean", "bias", "scale"):
            return 0.3 * n + (path[-1].key == "scale")
        return n / np.sqrt(max(1, leaf.size // leaf.shape[-1]))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def as_float32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def relative(ours, expected):
    return np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected)


X = np.random.RandomState(3).standard_normal((2, 9, 6, 16))
X32 = jnp.asarray(X, jnp.float32)
CONFIGURATIONS = {
    "default": {},
    "reduced": {"reduced_channels": 8},
    "features": {"reduced_channels": 8, "restore": "features"},
    "concat": {"excitation": "concat"},
    "groups": {"groups": 4},
    "group_size": {"group_size": 2},
    "kernels": {"kernels": (3, 9)},
    "bins": {"bins": (3, 1)},
    "reduction": {"reduction": 2},
    "no mfe": {"mfe": False},
    "no hap": {"hap": False},
    "no ee": {"ee": False, "reduced_channels": 8},
    "only mfe": {"hap": False, "ee": False},
    "only hap": {"mfe": False, "ee": False},
    "only ee": {"mfe": False, "hap": False},
}


@pytest.mark.parametrize("form", ["conv", "shift"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_both_forms_equal_the_equations_in_float64(name, form):
    options = CONFIGURATIONS[name]
    module = HGA(16, form=form, **options)
    variables = random_variables(module, X32)
    bins = options.get("bins", (1, 2, 4)) if options.get("hap", True) else (1,)
    keep = {k: v for k, v in options.items() if k in ("excitation", "restore")}
    expected = naive.hga(X, variables.get("params", {}), bins, **keep)
    y = jax.jit(module.apply)(as_float32(variables), X32)
    assert relative(y, expected) < 1e-6


@pytest.mark.parametrize("form", ["conv", "shift"])
def test_norms_of_the_table2_preset_in_inference(form):
    module = HGA(16, reduced_channels=8, group_size=2, mfe_norm=True, restore_norm=True, form=form)
    variables = random_variables(module, X32)
    params, stats = variables["params"], variables["batch_stats"]

    def normalize(p, s, y):
        return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    def norm(kernel, y):
        which = kernel.replace("kernel", "norm")
        return normalize(params["mfe"][which], stats["mfe"][which], y)

    folded = jax.tree.map(lambda a: a, params)
    # BatchNorm on the restored vector, written as a naive last step.
    gate_input = naive_excitation(folded, norm)
    expected = X * naive.sigmoid(normalize(params["restore_norm"], stats["restore_norm"], gate_input))[:, None, None]
    assert relative(jax.jit(module.apply)(as_float32(variables), X32), expected) < 1e-6


def naive_excitation(params, norm):
    """The restored vector before the sigmoid, recovered from the naive gate."""
    gated = naive.hga(X, params, norm=norm)
    gate = (gated / X).mean(axis=(1, 2))
    return np.log(gate / (1 - gate))


def test_activation_in_the_mfe():
    module = HGA(16, mfe_act="relu")
    variables = random_variables(module, X32)
    expected = naive.hga(X, variables["params"], act=lambda y: np.maximum(y, 0))
    assert relative(jax.jit(module.apply)(as_float32(variables), X32), expected) < 1e-6


def test_both_forms_have_the_same_gradients():
    x = jnp.asarray(X, jnp.float32)
    modules = {form: HGA(16, reduced_channels=8, form=form) for form in ("conv", "shift")}
    variables = as_float32(random_variables(modules["conv"], x))

    def gradients(form):
        loss = lambda v, x: jnp.sum(jnp.sin(modules[form].apply(v, x)))
        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x))

    for conv, shift in zip(gradients("conv"), gradients("shift"), strict=True):
        assert relative(shift, np.asarray(conv, np.float64)) < 1e-5


@pytest.mark.parametrize("options", [{}, {"group_size": 2, "mfe_norm": True}, {"excitation": "concat"}])
def test_both_forms_have_the_same_parameters(options):
    shapes = [
        jax.tree.map(
            lambda a: a.shape,
            jax.eval_shape(lambda f=form: HGA(64, form=f, **options).init(jax.random.key(0), jnp.zeros((1, 8, 8, 64)))),
        )
        for form in ("conv", "shift" if "mfe_norm" not in options else "auto")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("channels", [16, 32, 64, 256])
def test_parameters_are_those_of_equation_12(channels):
    module = HGA(channels, reduced_channels=None)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 8, channels))))["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == 84 * channels + 11 * channels**2 // 2


def uses_convolution(module, x, train):
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    mutable = ["batch_stats"] if train else False
    program = jax.make_jaxpr(lambda v: module.apply(v, x, train, mutable=mutable))(variables)
    return "conv_general_dilated" in str(program)


def test_auto_takes_shift_pooling_exactly_where_the_mfe_is_linear():
    x = jnp.zeros((1, 8, 8, 16))
    assert not uses_convolution(HGA(16), x, train=True)
    assert uses_convolution(HGA(16, form="conv"), x, train=False)
    assert uses_convolution(HGA(16, mfe_act="relu"), x, train=False)
    assert uses_convolution(HGA(16, mfe_norm=True), x, train=True)
    assert not uses_convolution(HGA(16, mfe_norm=True), x, train=False)


def test_without_any_stage_it_is_the_identity_and_has_no_parameters():
    module = HGA(64, mfe=False, hap=False, ee=False)
    x = jnp.ones((1, 4, 4, 64))
    variables = module.init(jax.random.key(0), x)
    assert not jax.tree.leaves(variables)
    assert (module.apply(variables, x) == x).all()


def test_bfloat16_stays_near_float32():
    x = jnp.asarray(X, jnp.float32)
    full, half = HGA(16), HGA(16, dtype=jnp.bfloat16)
    variables = as_float32(random_variables(full, x))
    y = half.apply(variables, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert 1e-4 < relative(y.astype(jnp.float32), np.asarray(full.apply(variables, x), np.float64)) < 2e-2
    assert {p.dtype for p in jax.tree.leaves(jax.eval_shape(lambda: half.init(jax.random.key(0), x)))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": (2,)}, "odd"),
        ({"kernels": ()}, "odd"),
        ({"groups": 3}, "does not divide"),
        ({"group_size": 3}, "does not divide"),
        ({"group_size": 0}, "not positive"),
        ({"groups": 4, "group_size": 2}, r"groups=4 and group_size=2 contradict each other.*preset.*set group_size=1"),
        ({"excitation": "both"}, "'shared' or 'concat'"),
        ({"restore": "map"}, "'gate' or 'features'"),
        ({"restore": "features", "restore_norm": True}, r"restore_norm=True.*preset.*set restore_norm=False"),
        ({"form": "fast"}, "choose from: auto"),
        ({"form": "shift", "mfe_act": "relu"}, "linear MFE"),
        ({"mfe_act": "wave"}, "choose from: relu"),
        ({"bins": (0,)}, "at least one cell"),
        ({"reduction": 0}, "not positive"),
        ({"reduced_channels": 0}, "not positive"),
    ],
)
def test_bad_options_are_refused(options, message, train):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: HGA(16, **options).init(jax.random.key(0), jnp.zeros((1, 8, 8, 16)), train))


@pytest.mark.parametrize(
    ("option", "remedy"), [({"groups": 8}, {"group_size": 1}), ({"restore": "features"}, {"restore_norm": False})]
)
def test_an_option_that_contradicts_a_presets_names_the_remedy(option, remedy):
    def build(**options):
        attention = create_attention("hga_table2", 16, **options)
        return jax.eval_shape(lambda: attention.init(jax.random.key(0), jnp.zeros((1, 8, 8, 16))))

    ((name, value),) = remedy.items()
    with pytest.raises(ValueError, match=rf"a preset may have set one of them\); set {name}={value}"):
        build(**option)
    build(**option, **remedy)


def test_the_wrong_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"needs a map \[B, H, W, 32\], not \[1, 8, 8, 16\]"):
        HGA(32).init(jax.random.key(0), jnp.zeros((1, 8, 8, 16)))


def test_golden_values():
    cases = goldens.load("tests/golden/hga.json")
    for case, form in itertools.product(cases.values(), ("conv", "shift")):
        assert max(goldens.check_hga_case(case, form).values()) < goldens.HGA_TOLERANCE
