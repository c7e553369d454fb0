"""Counts against published ones (torchvision and timm, measured with thop) and against XLA's own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from hga_flax.attention import IdentityStart, SqueezeExcitation, attention_names
from hga_flax.counting import complexity as measuring
from hga_flax.counting.complexity import Complexity, complexity, count_operations
from hga_flax.models import create_model
from hga_flax.models.cifar_resnet import SmallBlock

# parameters, running statistics, conv + fc MACs, BatchNorm elements, thop's total: torchvision's networks.
VANILLA = {
    "resnet50": (25_557_032, 53_120, 4_089_184_256, 11_113_984, 4_111_514_624),
    "resnet101": (44_549_160, 105_344, 7_801_405_440, 16_231_936, 7_833_971_712),
    "resnet152": (60_192_808, 151_424, 11_513_626_624, 22_554_112, 11_558_837_248),
    "resnext50_32x4d": (25_028_904, 68_224, 4_230_479_872, 14_400_512, 4_259_383_296),
    "resnext101_32x4d": (44_177_704, 137_856, 7_969_996_800, 21_224_448, 8_012_548_096),
}
# parameters and conv + fc MACs of timm's seresnet50 and its like.
SQUEEZE_EXCITATION = {
    "resnet50": (28_088_024, 4_091_699_200),
    "resnet101": (49_326_872, 7_806_148_608),
    "resnet152": (66_821_848, 11_520_204_800),
    "resnext50_32x4d": (27_559_896, 4_232_994_816),
    "resnext101_32x4d": (48_955_416, 7_974_739_968),
}


@pytest.mark.parametrize("name", VANILLA)
def test_plain_networks_have_the_published_counts(name):
    counted = complexity(create_model(name))
    total = (counted.params, counted.batch_stats, counted.conv_fc_macs, counted.bn_elements, counted.thop_total)
    assert total == VANILLA[name]


@pytest.mark.parametrize("name", SQUEEZE_EXCITATION)
def test_squeeze_excitation_networks_have_the_published_counts(name):
    counted = complexity(create_model(name, attention="se"))
    assert (counted.params, counted.conv_fc_macs) == SQUEEZE_EXCITATION[name]


def test_shift_pooling_computes_less_than_the_convolutions():
    conv = complexity(create_model("resnet50", attention="hga", attention_options={"form": "conv"}))
    shift = complexity(create_model("resnet50", attention="hga"))
    plain = complexity(create_model("resnet50"))
    assert conv.params == shift.params == 26_656_808
    assert plain.conv_fc_macs < shift.conv_fc_macs < conv.conv_fc_macs
    assert round(conv.gflops, 3) == 4.326


def test_gflops_add_two_operations_per_batch_norm_element():
    counted = Complexity(1, 1, conv_fc_macs=3 * 10**9, bn_elements=10**9, pool_reads=5, pool_outputs=2)
    assert counted.gflops == 5.0
    assert counted.thop_total == 5 * 10**9 + 7


def array(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def xla_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def convolve(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "VALID"} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


OPERATIONS = {
    "plain": (convolve, array(2, 9, 8, 6), array(3, 3, 6, 10)),
    "strided": (lambda x, k: convolve(x, k, window_strides=(2, 2)), array(1, 9, 9, 4), array(3, 3, 4, 8)),
    "grouped": (lambda x, k: convolve(x, k, feature_group_count=4), array(1, 7, 7, 8), array(3, 3, 2, 12)),
    "depthwise": (lambda x, k: convolve(x, k, feature_group_count=8), array(1, 7, 7, 8), array(5, 5, 1, 8)),
    "dilated": (lambda x, k: convolve(x, k, rhs_dilation=(2, 2)), array(1, 9, 9, 4), array(3, 3, 4, 4)),
    "channels first": (lambda x, k: lax.conv(x, k, (1, 1), "VALID"), array(1, 3, 9, 9), array(5, 3, 3, 3)),
    "transposed": (lambda x, k: lax.conv_transpose(x, k, (2, 2), "VALID"), array(1, 5, 7, 4), array(2, 2, 4, 6)),
    "matrix product": (jnp.matmul, array(3, 5), array(5, 7)),
    "batched product": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), array(2, 3, 5), array(2, 5, 7)),
    "two contracted axes": (lambda a, b: jnp.einsum("bij,ijk->bk", a, b), array(2, 3, 5), array(3, 5, 7)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_unpadded_operations_equal_xlas_count(name):
    function, *arguments = OPERATIONS[name]
    assert 2 * count_operations(function, *arguments).conv_fc_macs == xla_flops(function, *arguments)


def test_a_network_agrees_with_xlas_cost_analysis():
    """Within 2 %: XLA leaves out the taps on the padding and adds the elementwise operations."""
    model = create_model("resnet50", attention="hga", num_classes=10, features=16)
    images = array(1, 224, 224, 3)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images.shape)))
    xla = xla_flops(lambda variables, images: model.apply(variables, images, train=False), variables, images)
    assert 2 * complexity(model).conv_fc_macs == pytest.approx(xla, rel=0.02)


class Stack(nn.Module):
    """Three layers of conv and BatchNorm, called directly, recomputed (remat) or looped over (scan)."""

    how: str

    @nn.compact
    def __call__(self, x, train=False):
        if self.how == "scan":
            scan = nn.scan(Layer, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
            return scan()(x, None)[0]
        layer = nn.remat(Layer) if self.how == "remat" else nn.jit(Layer) if self.how == "jit" else Layer
        for _ in range(3):
            x, _ = layer()(x, None)
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.avg_pool(x, (3, 3), padding="SAME"), None


@pytest.mark.parametrize("how", ["direct", "remat", "jit", "scan"])
def test_nested_programs_are_counted_as_often_as_they_run(how):
    elements = 8 * 8 * 4
    expected = Complexity(
        params=3 * (9 * 4 * 4 + 8),
        batch_stats=3 * 8,
        conv_fc_macs=3 * elements * 36,
        bn_elements=3 * elements,
        pool_reads=3 * elements * 9,
        pool_outputs=3 * elements,
    )
    assert complexity(Stack(how), (8, 8, 4)) == expected


def test_of_two_branches_the_dearer_counts():
    def branch(x, chosen):
        return lax.cond(chosen, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_operations(branch, array(4, 4), jax.ShapeDtypeStruct((), bool)).conv_fc_macs == 2 * 4**3


def test_a_loop_of_unknown_length_is_refused():
    def loop(x):
        return lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="while"):
        count_operations(loop, array(4, 4))


def check_like_a_whole_trace(network, image_shape):
    """Counts as one trace of the whole network does."""
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    whole = count_operations(lambda variables, images: network.apply(variables, images), variables, images)
    counted = complexity(network, image_shape)
    assert {name: getattr(counted, name) for name in vars(whole)} == vars(whole)
    assert counted.params == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert counted.batch_stats == sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"]))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "attention"),
    [("cifar_preact_resnet20", "hga_table2"), ("cifar_resnet20", "sk"), ("resnet50", "hga"), ("googlenet", "se")],
)
def test_equal_blocks_are_traced_once_and_counted_each_time(name, attention):
    check_like_a_whole_trace(create_model(name, attention=attention), (64, 64, 3))


@pytest.mark.parametrize("attention", [name for name in attention_names() if name not in ("none", "sk")])
def test_with_an_identity_start_no_share_is_counted_twice(attention):
    options = {"identity_start": True}
    check_like_a_whole_trace(create_model("cifar_resnet8", attention=attention, attention_options=options), (32, 32, 3))


class InTheLastStage(nn.Module):
    """An attention that depends on its place in the network."""

    channels: int
    dtype: object = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        return x * nn.Dense(self.channels)(x) if "stage3" in "/".join(self.path) else x


@pytest.mark.parametrize("start", [False, True])
def test_an_attention_of_ones_own_may_depend_on_its_place(start):
    attention = functools.partial(IdentityStart, attention=InTheLastStage) if start else InTheLastStage
    network = create_model("cifar_resnet8", attention=attention)
    check_like_a_whole_trace(network, (32, 32, 3))
    plain = complexity(create_model("cifar_resnet8"), (32, 32, 3)).params
    assert complexity(network, (32, 32, 3)).params == plain + 64 * 65 + start * (16 + 32 + 64)


def test_a_function_of_ones_own_is_asked_each_time():
    def attention(channels, **given):
        return SqueezeExcitation(channels, ratio=ratio, **given)

    counted = []
    for ratio in (4, 16):
        counted.append(complexity(create_model("cifar_resnet8", attention=attention), (32, 32, 3)).params)
        named = create_model("cifar_resnet8", attention="se", attention_options={"ratio": ratio})
        assert counted[-1] == complexity(named, (32, 32, 3)).params
    assert counted[0] > counted[1]


@pytest.mark.parametrize("bound", [False, True])
def test_an_object_that_makes_attentions_is_asked_each_time(bound):
    class Maker:
        ratio = 16

        def make(self, channels, **given):
            return SqueezeExcitation(channels, ratio=self.ratio, **given)

        __call__ = make

    maker = Maker()
    network = create_model("cifar_resnet8", attention=maker.make if bound else maker)
    first = complexity(network, (32, 32, 3)).params
    maker.ratio = 2
    named = create_model("cifar_resnet8", attention="se", attention_options={"ratio": 2})
    assert complexity(network, (32, 32, 3)).params == complexity(named, (32, 32, 3)).params > first


def test_a_function_without_a_module_is_counted():
    attention = eval("lambda channels, **given: SE(channels, **given)", {"SE": SqueezeExcitation, "__name__": None})
    named = complexity(create_model("cifar_resnet8", attention="se"), (32, 32, 3)).params
    assert complexity(create_model("cifar_resnet8", attention=attention), (32, 32, 3)).params == named


def test_the_54_blocks_of_a_deep_network_are_five_traces(monkeypatch):
    monkeypatch.setattr(measuring, "_MEASURED", {})
    complexity(create_model("cifar_resnet110"), (32, 32, 3))
    blocks = [key for key in measuring._MEASURED if key[0] is SmallBlock]
    assert len(blocks) == 5  # the first stage's, and of two more stages the first block and the others
