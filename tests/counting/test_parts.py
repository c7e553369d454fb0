import flax
import flax.linen as nn
import pytest

from hga_flax.counting.complexity import complexity
from hga_flax.counting.parts import model_parts, part_of, parts_table, total
from hga_flax.models import create_model


def parts(model="cifar_resnet8", attention="hga", size=8, blocks=False, **options):
    network = create_model(model, attention=attention, num_classes=10, **options)
    return network, model_parts(network, (size, size, 1), blocks=blocks)


def test_the_parts_hold_every_parameter_and_their_maps():
    network, found = parts(features=4)
    assert [part.name for part in found] == ["stem", "stage1", "stage2", "stage3", "classifier"]
    assert [part.output for part in found] == [(8, 8, 4), (8, 8, 4), (4, 4, 8), (2, 2, 16), (10,)]
    plain = complexity(create_model("cifar_resnet8", features=4, num_classes=10), (8, 8, 1)).params
    assert total(found).parameters == complexity(network, (8, 8, 1)).params
    assert total(found).parameters - total(found).attention == plain


@pytest.mark.medium
@pytest.mark.parametrize(
    ("model", "attention", "options"),
    [("cifar_resnet8", "hga", {}), ("cifar_resnet8", "sk", {}), ("googlenet", "hga", {"width_divisor": 8})],
)
def test_their_operations_are_the_networks(model, attention, options):
    with flax.config.temp_flip_flag("profile", False):  # whatever the user set
        network, found = parts(model, attention, 32, **options)
    assert total(found).macs == complexity(network, (32, 32, 1)).conv_fc_macs
    assert 0 < total(found).attention_macs < total(found).macs


def test_a_module_of_ones_own():
    """With a product outside its modules, and a module that returns several arrays."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x, nn.Dense(5)(x.mean((1, 2)))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = x @ self.param("mix", nn.initializers.ones, (3, 8))
            x, logits = Two(name="head")(nn.Conv(4, (3, 3), name="stem")(x))
            return logits

    listed = model_parts(Net(), (8, 8, 3))
    found = {part.name: part for part in listed}
    assert {name: part.macs for name, part in found.items()} == {
        "stem": 64 * 9 * 8 * 4, "head": 4 * 5, "mix": 0, "(itself)": 64 * 3 * 8,
    }  # fmt: skip
    assert found["head"].output == (5,) and total(listed).macs == complexity(Net(), (8, 8, 3)).conv_fc_macs


def test_the_attentions_operations_are_those_of_its_formula():
    _, found = parts(attention="se", size=16)
    hidden = {16: 1, 32: 2, 64: 4}  # FC C -> C/16 and back, once a block
    assert [part.attention_macs for part in found[1:4]] == [2 * c * h for c, h in hidden.items()]
    assert found[0].macs == 16 * 16 * 9 * 16 and found[-1].macs == 64 * 10


def test_heads_that_only_training_calls_come_last():
    _, found = parts("googlenet", "none", 32, aux_logits=True, width_divisor=8)
    assert [(part.name, part.output) for part in found[-2:]] == [("auxiliary1", ()), ("auxiliary2", ())]
    assert found[-1].parameters > 0 and found[-1].macs == 0
    assert total(found).output == (10,)


def test_blocks_have_rows_of_their_own():
    _, stages = parts("cifar_resnet14", features=4)
    _, blocks = parts("cifar_resnet14", features=4, blocks=True)
    assert [part.name for part in blocks[:4]] == ["stem", "stage1_block1", "stage1_block2", "stage2_block1"]
    assert total(blocks) == total(stages)
    names = ("stem_conv", "transition1_norm", "inception4a", "block1_layer2")
    assert [part_of(name, blocks=True) for name in names] == [
        "stem", "transition1", "inception4a", "block1_layer2",
    ]  # fmt: skip


def test_the_table_ends_with_the_whole_network():
    _, found = parts("cifar_resnet8", features=4)
    header, rows = parts_table(found)
    assert len(rows) == len(found) + 1 and all(len(row) == len(header) for row in rows)
    whole = total(found)
    assert rows[-1][:4] == ("total", "10", f"{whole.parameters:,}", f"{whole.attention:,}")
    assert rows[-1][4] == f"{100 * whole.attention / whole.parameters:.1f}%"
