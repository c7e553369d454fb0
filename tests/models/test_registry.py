import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from hga_flax.attention import IdentityStart
from hga_flax.models import create_model, model_names, model_options
from tests.models.pairs import check_gradient_step, different_pairs, has_place, tiny_options
from tests.models.parameter_counts import CIFAR, ON_RESNET50, PLAIN, SE
from tests.reference import parameter_count

SLOW = {"resnet152", "resnext101_64x4d", "densenet161", "densenet169", "densenet201", "wide_resnet101_2"}
SLOW |= {"res2net50_26w_6s", "res2net50_26w_8s", "res2net50_14w_8s", "res2net101_26w_4s", "res2net50d", "res2net101d"}
SLOW |= {"resnest101e", "resnest200e", "resnest269e", "resnest50d_4s2x40d"}
STAGES = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}


def count(name: str, attention: str = "none", size: int = 64, **options) -> int:
    return parameter_count(create_model(name, attention=attention, **options), (1, size, size, 3))


def hga_count(widths: list[int]) -> int:
    """Eq. 12 on 32 channels, and the two FCs of HGA(C, 32, C)."""
    return sum(84 * 32 + 11 * 32 * 32 // 2 + (2 * 32 * width if width > 32 else 0) for width in widths)


def slow_where(name: str):
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


def test_no_model_is_missing_from_the_table():
    assert set(model_names()) == set(PLAIN)


@pytest.mark.parametrize("name", [slow_where(name) for name in PLAIN])
def test_parameter_counts(name):
    assert count(name) == PLAIN[name]


@pytest.mark.parametrize("name", [slow_where(name) for name in SE])
def test_parameter_counts_with_se(name):
    assert count(name, "se") == SE[name]


@pytest.mark.parametrize(("name", "depth"), [("resnet50", "50"), ("resnext50_32x4d", "50")])
def test_parameter_counts_with_hga(name, depth):
    widths = [256 * 2**stage for stage, blocks in enumerate(STAGES[depth]) for _ in range(blocks)]
    assert count(name, "hga") == PLAIN[name] + hga_count(widths)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth"), [("resnet101", "101"), ("resnet152", "152"), ("resnext101_32x4d", "101")])
def test_parameter_counts_with_hga_of_deep_networks(name, depth):
    widths = [256 * 2**stage for stage, blocks in enumerate(STAGES[depth]) for _ in range(blocks)]
    assert count(name, "hga") == PLAIN[name] + hga_count(widths)


def test_parameter_counts_with_hga_of_basic_blocks():
    widths = [64 * 2**stage for stage in range(4) for _ in range(2)]
    assert count("resnet18", "hga") == PLAIN["resnet18"] + hga_count(widths)


@pytest.mark.medium
def test_parameter_counts_with_hga_outside_the_resnets():
    concatenations = [256, 480, 512, 512, 512, 528, 832, 832, 1024]
    assert count("googlenet", "hga") == PLAIN["googlenet"] + hga_count(concatenations)
    assert count("densenet121", "hga") == PLAIN["densenet121"] + hga_count([32] * 58)
    assert count("vgg16_bn", "hga") == PLAIN["vgg16_bn"] + hga_count([64, 128, 256, 512, 512])


@pytest.mark.parametrize("name", [pytest.param("res2net50_26w_4s", marks=pytest.mark.slow), "resnest14d"])
def test_hga_costs_the_same_in_every_bottleneck(name):
    sizes = model_options(name)["stage_sizes"]
    widths = [256 * 2**stage for stage, blocks in enumerate(sizes) for _ in range(blocks)]
    assert count(name, "hga") == PLAIN[name] + hga_count(widths)


@pytest.mark.medium
def test_table2_preset_has_the_papers_count():
    assert round(count("resnet50", "hga_table2") / 1e6, 2) == 26.73
    assert round(count("resnext50_32x4d", "hga_table2") / 1e6, 2) == 26.21


@pytest.mark.parametrize(("attention", "added"), ON_RESNET50.items())
def test_what_comparators_add_to_resnet50(attention, added):
    assert count("resnet50", attention) - PLAIN["resnet50"] == added


def test_timms_se_resnet18_has_at_least_eight_hidden_channels():
    assert count("resnet18", "se", attention_options={"min_channels": 8}) == 11_779_624


def test_sknets():
    assert count("resnext50_32x4d", "sk") == 27_479_784
    assert count("resnext101_32x4d", "sk") == 48_736_040


@pytest.mark.parametrize(("name", "attention"), CIFAR)
def test_parameter_counts_of_cifar_nets(name, attention):
    assert count(name, attention, size=32, num_classes=10) == CIFAR[name, attention]


def test_parameter_counts_of_cifar_nets_with_100_classes_and_without_projections():
    assert count("cifar_resnet110", size=32, num_classes=10, shortcut="A") == 1_727_962
    assert count("cifar_resnet110", size=32, num_classes=100, shortcut="A") == 1_733_812
    assert count("cifar_preact_resnet164_bottleneck", size=32, num_classes=100) == 1_726_388
    assert count("cifar_resnet110", "se", size=32, num_classes=10, shortcut="A") == 1_742_200


def test_parameter_counts_of_googlenets_options():
    assert count("googlenet", aux_logits=True) == 13_004_888
    assert count("googlenet", true_5x5=True) == 7_005_832
    assert count("googlenet", true_5x5=True, aux_logits=True) == 13_385_816


# Other values for every option of every class of networks, on a small network of that class.
SMALL = {
    "resnet18": {"stage_sizes": (1, 1), "features": 8},
    "resnet50": {"stage_sizes": (1, 1), "features": 16},
    "cifar_resnet8": {"features": 4},
    "cifar_preact_resnet8": {"features": 4},
    "cifar_wide_resnet10_2": {"features": 4},
    "googlenet": {"width_divisor": 8},
    "densenet121": {"block_sizes": (2, 1), "growth": 4, "features": 8},
    "vgg11_bn": {"stage_sizes": (1, 1), "features": 4, "hidden": 8},
    "res2net50_26w_4s": {"stage_sizes": (1, 1), "features": 32},
    "resnest50d": {"stage_sizes": (1, 1), "features": 8, "stem_width": 8},
}
RESIDUAL = {
    "stage_sizes": (1, 2),
    "features": 32,
    "zero_init_residual": True,
    "stochastic_depth": 0.5,
    "dropout": 0.5,
    "stem_width": 4,
    "average_down": True,
}
ALTERNATIVES = {
    "resnet18": RESIDUAL,
    "resnet50": RESIDUAL | {"cardinality": 2, "width_per_group": 32},
    "cifar_resnet8": {"features": 8, "shortcut": "A", "widen": 2, "dropout": 0.5, "stochastic_depth": 0.5},
    "cifar_preact_resnet8": {"features": 8, "shortcut": "A", "widen": 2, "dropout": 0.5, "stochastic_depth": 0.5},
    "cifar_wide_resnet10_2": {"features": 8, "shortcut": "A", "dropout": 0.5, "stochastic_depth": 0.5},
    "googlenet": {
        "aux_logits": True,
        "true_5x5": True,
        "transform_input": True,
        "dropout": 0.5,
        "aux_dropout": 0.5,
        "width_divisor": 4,
    },
    "densenet121": {"block_sizes": (1, 1), "growth": 8, "features": 4, "bottleneck": 2, "dropout": 0.5},
    "vgg11_bn": {"stage_sizes": (1, 2), "batch_norm": False, "features": 8, "hidden": 4, "dropout": 0.0},
    "res2net50_26w_4s": RESIDUAL | {"features": 64, "scale": 2, "width_per_group": 32, "cardinality": 13},
    "resnest50d": RESIDUAL
    | {"average_down": False, "radix": 1, "cardinality": 2, "width_per_group": 32, "average_first": True},
}
BESIDE = {("googlenet", "aux_dropout"): {"aux_logits": True}}


@functools.cache
def programs(name: str, options: tuple) -> tuple[str, str]:
    """Returns the traced initialisation and training pass, as text."""
    model = create_model(name, num_classes=5, **dict(options))
    x = jnp.zeros((2, 32, 32, 3))
    init, variables = jax.make_jaxpr(model.init, return_shape=True)(jax.random.key(0), x)
    apply = functools.partial(
        model.apply, train=True, mutable=["batch_stats", "aux_logits"], rngs={"dropout": jax.random.key(1)}
    )
    return str(init), str(jax.make_jaxpr(apply)(variables, x))


@pytest.mark.parametrize("name", SMALL)
def test_no_option_is_missing_from_the_table(name):
    assert set(model_options(name)) == set(ALTERNATIVES[name])


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in ALTERNATIVES for option in ALTERNATIVES[name]])
def test_every_option_changes_the_program(name, option):
    base = SMALL[name] | BESIDE.get((name, option), {})
    changed = base | {option: ALTERNATIVES[name][option]}
    assert base != changed
    assert programs(name, tuple(base.items())) != programs(name, tuple(changed.items()))


CIFAR_NETS = [
    "cifar_resnet8",
    "cifar_preact_resnet8",
    "cifar_resnet11_bottleneck",
    "cifar_preact_resnet11_bottleneck",
    "cifar_wide_resnet10_2",
]


SAMPLE = [("resnext50_32x4d", "sk"), ("resnet50", "hga")]
PAIRS = different_pairs([*model_names(), *CIFAR_NETS], tiny_options)


@pytest.mark.parametrize(("name", "attention"), SAMPLE)
def test_gradient_step_sample(name, attention):
    check_gradient_step(name, attention)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), [pair for pair in PAIRS if pair not in SAMPLE])
def test_gradient_step_of_every_pair(name, attention, short_googlenet):
    check_gradient_step(name, attention)


@pytest.mark.parametrize("name", [name for name in model_names() if not has_place(name, "sk")])
def test_sk_is_refused_where_no_blocks_3x3_feeds_a_relu(name):
    with pytest.raises(ValueError, match=f"model '{name}' has no place for an attention that replaces a 3x3"):
        create_model(name, attention="sk")


FAMILIES = ["cifar_resnet8", "cifar_preact_resnet8", "resnet18", "resnet50", "res2net50_26w_4s", "resnest50d"]
FAMILIES += ["googlenet", "vgg11_bn", "densenet121"]


class Gate(nn.Module):
    """An attention whose author forgot to multiply the map by the gate."""

    channels: int
    dtype: object = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        return nn.sigmoid(nn.Dense(self.channels)(x.mean((1, 2))))[:, None, None]


class InPlace(Gate):
    """An attention in place of a convolution that does not stride."""

    replaces_convolution = True
    stride: int = 1
    replaced_groups: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.channels)(x)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_attention_that_changes_the_shape_is_refused(name):
    message = r"attention Gate must return a map \[2, \d+, \d+, (\d+)\], but returned \[2, 1, 1, \1\]"
    for attention in (Gate, functools.partial(IdentityStart, attention=Gate)):
        model = create_model(name, attention=attention, num_classes=10)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 64, 64, 3)))


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", "resnet50"])
def test_an_attention_in_place_of_a_convolution_must_stride_as_it_did(name):
    model, size = create_model(name, attention=InPlace, num_classes=10), 16 if name == "cifar_resnet8" else 64
    with pytest.raises(ValueError, match=r"attention InPlace must return a map \[2, 8, 8, \d+\], but returned \[2, 16"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, size, size, 3)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "did you mean 'resnet5"),
        ("cifar_resnet21", "depth 21 is not 6n"),
        ("cifar_wide_resnet26_10", "depth 26 is not 6n [+] 4.*22 and 28"),
        ("cifar_wide_resnet28_0", "not positive"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="model 'googlenet' has no option 'aux_logit'; did you mean"):
        create_model("googlenet", aux_logit=True)
    with pytest.raises(ValueError, match="no option 'depth'"):
        create_model("cifar_wide_resnet28_10", depth=8)
    with pytest.raises(ValueError, match="attention_options need a named attention"):
        create_model("resnet50", attention=nn.Dense, attention_options={"ratio": 4})
    with pytest.raises(ValueError, match=r"^attention=None must be a name \('none' for no attention\) or a factory"):
        create_model("resnet50", attention=None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"stage_sizes": (1, 1, 1, 1)}),
        ("resnet50", {"stage_sizes": (1, 1, 1, 1)}),
        ("densenet121", {"block_sizes": (1, 1, 1, 1)}),
        ("vgg11_bn", {"features": 8, "hidden": 8}),
        ("res2net50d", {"stage_sizes": (1, 1, 1, 1)}),
        ("resnest14d", {"features": 16}),
        ("googlenet", {"width_divisor": 8}),
        ("cifar_resnet8", {}),
        ("cifar_preact_resnet11_bottleneck", {}),
    ],
)
def test_the_stride_is_by_how_much_a_map_shrinks(name, options):
    model, maps = create_model(name, **options), []

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and getattr(result, "ndim", 0) == 4:
            maps.append(result.shape[1:3])
        return result

    with nn.intercept_methods(watch):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2 * model.stride, 3 * model.stride, 3)))
    assert maps[-1] == (2, 3)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("resnet50", "stage_sizes", (-1, 2)), ("resnet50", "cardinality", 0), ("densenet121", "growth", 0),
        ("densenet121", "block_sizes", (1, 0)), ("vgg11", "stage_sizes", ()), ("vgg11", "hidden", 0),
        ("resnest14d", "radix", -2),
        ("cifar_resnet8", "widen", 0), ("googlenet", "width_divisor", 0), ("res2net50d", "scale", 0),
    ],
)  # fmt: skip
def test_an_option_that_leaves_nothing_is_refused(name, option, value):
    with pytest.raises(ValueError, match=rf"^model '{name}': {option}={re.escape(str(value))} is not positive$"):
        create_model(name, **{option: value})
    create_model("resnest14d", stem_width=0)  # the plain stem


def test_an_option_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"^model 'resnet50': option stage_sizes=3 must be of type Sequence\[int\]$"):
        create_model("resnet50", stage_sizes=3)
    for classes in (0, -1, "10", 10.0, True):
        with pytest.raises(ValueError, match=f"num_classes={classes!r} must be a positive integer"):
            create_model("cifar_resnet8", num_classes=classes)
