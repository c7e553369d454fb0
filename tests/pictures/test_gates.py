from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from hga_flax.attention import HGA, attention_factory
from hga_flax.pictures import gates as g
from tests.reference import sample


class Block(nn.Module):
    attention: Any

    @nn.compact
    def __call__(self, x, train):
        return self.attention(x.shape[-1], name="attention")(x, train)


class Net(nn.Module):
    """Two attentions where the project's networks have them."""

    attention: Any

    @nn.compact
    def __call__(self, x, train=False):
        for stage in (1, 2):
            x = Block(self.attention, name=f"stage{stage}_block1")(x, train)
        return x


def seen(attention, **options):
    """Returns (variables, gates) of two attentions of 8 channels, whose statistics are not those of their start."""
    network = Net(attention_factory(attention, **options))
    x = sample((2, 8, 8, 8))
    variables = jax.jit(network.init)(jax.random.key(0), x)
    move = lambda leaf: leaf + 0.3 + 0.1 * np.arange(leaf.size, dtype=np.float32) / leaf.size
    variables = {
        "params": variables.get("params", {}),
        "batch_stats": jax.tree.map(move, variables.get("batch_stats", {})),
    }
    _, state = jax.jit(lambda variables: network.apply(variables, x, mutable=["intermediates"]))(variables)
    return variables, g.read_gates(network, variables, state.get("intermediates", {}))


HGA_OPTIONS = [
    {},
    {"form": "conv", "excitation": "concat"},
    {"mfe": False, "bins": (1, 3)},
    {"hap": False, "reduced_channels": 4},
    {"reduced_channels": 4, "restore": "features"},
    {"reduced_channels": 4, "ee": False},
]


@pytest.mark.medium
@pytest.mark.parametrize("options", HGA_OPTIONS, ids=str)
def test_the_cells_parts_add_up_to_what_the_gate_is_the_sigmoid_of(options):
    _, blocks = seen("hga", **options)
    assert [block.block for block in blocks] == ["stage1_block1", "stage2_block1"]
    for block in blocks:
        assert block.drive.shape == (2, sum(j * j for j in block.bins), block.gate.shape[-1])
        gate = 1 / (1 + np.exp(-block.drive.astype(np.float64).sum(axis=1)))
        np.testing.assert_allclose(gate, block.gate, rtol=1e-4, atol=1e-6)
    assert max(np.abs(block.gate - 0.5).max() for block in blocks) > 0.01


def test_the_parts_equal_the_equations():
    """Eqs. 4-5 without their sums over the cells, where the ReLU passes."""
    cells = np.asarray(sample((2, 1, 21, 16)))
    module = HGA(16)
    params = jax.jit(module.init)(jax.random.key(0), sample((2, 8, 8, 16)))["params"]
    suppress, excite = (np.asarray(params["ee"][name], np.float64) for name in ("suppress", "excite"))
    hidden = np.einsum("bkc,kch->bkh", cells[:, 0], suppress)
    expected = (hidden * (hidden.sum(axis=1, keepdims=True) > 0)) @ excite
    np.testing.assert_allclose(g.cell_drive(module, {"params": params}, cells), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_before_the_gate_adds_constants_that_no_cell_is_given():
    variables, blocks = seen("hga_table2", reduced_channels=4)
    block = blocks[-1]
    own = {name: variables[name][block.block]["attention"] for name in variables}
    norm, stats = own["params"]["restore_norm"], own["batch_stats"]["restore_norm"]
    constant = norm["bias"] - norm["scale"] * stats["mean"] / np.sqrt(stats["var"] + 1e-5)
    gate = 1 / (1 + np.exp(-(block.drive.sum(axis=1) + constant)))
    assert np.abs(constant).max() > 0.1
    np.testing.assert_allclose(gate, block.gate, rtol=1e-4)


@pytest.mark.parametrize(
    ("attention", "options"), [("hga", {}), ("se", {}), ("hga", {"reduced_channels": 4, "restore": "features"})]
)
def test_an_identity_start_keeps_the_cells_and_its_share_is_in_the_factor(attention, options):
    variables, plain = seen(attention, **options)
    factory = attention_factory(attention, identity_start=True, **options)
    network, share = Net(factory), np.linspace(-0.5, 1, 8, dtype=np.float32)
    for block in variables["params"].values():
        block["attention"]["identity_start_share"] = share
    x = sample((2, 8, 8, 8))
    state = jax.jit(lambda x: network.apply(variables, x, mutable=["intermediates"])[1])(x)
    first, second = g.read_gates(network, variables, state["intermediates"])
    np.testing.assert_allclose(first.gate, plain[0].gate, rtol=1e-6)
    assert first.bins == plain[0].bins and (first.drive is None) == (plain[0].drive is None)
    if options:  # the gate is that of the reduced channels, not of those that have shares
        assert first.share is None and (first.factor == first.gate).all() and g.title([first]) == "gates"
        return
    between = Block(factory).apply({"params": variables["params"]["stage1_block1"]}, x, False)
    np.testing.assert_allclose(x * first.factor[:, None, None], between, rtol=1e-5, atol=1e-6)
    assert g.title([first, second]) == "gates (share of the attention included)"


@pytest.mark.parametrize("attention", ["se", "eca"])
def test_other_gates_have_no_cells(attention):
    _, blocks = seen(attention)
    assert len(blocks) == 2 and all(block.drive is None and block.bins == () for block in blocks)
    assert blocks[0].gate.shape == (2, 8)
    assert all(((block.gate > 0) & (block.gate < 1)).all() for block in blocks)


class Spatial(nn.Module):
    """Sows a gate for each place, twice or once."""

    channels: int
    times: int = 1
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(self.times):
            self.sow("intermediates", "gate", nn.sigmoid(x.mean(-1) if self.times > 1 else x[..., :1]))
        return x


@pytest.mark.parametrize("times", [1, 2])
def test_gates_that_are_not_one_per_channel_are_left_out(times):
    network = Net(lambda channels, **given: Spatial(channels, times, **given))
    _, intermediates = network.apply({}, sample((1, 4, 4, 8)), mutable=["intermediates"])
    assert g.read_gates(network, {}, intermediates["intermediates"]) == []


def test_an_attention_without_gates_has_none():
    assert seen("none")[1] == []


def test_blocks_are_in_the_order_of_the_network():
    names = [f"stage1_block{i}" for i in (1, 10, 2)]
    assert sorted([(name, "attention") for name in names], key=g._natural)[1][0] == "stage1_block2"
    assert [g.stage_of(name) for name in ("stage1_block12", "inception4a", "block3_layer1", "mine")] == [
        "stage1", "inception4", "block3", "mine",
    ]  # fmt: skip


def block(drive):
    return g.BlockGates("stage1", "stage1_block1", np.zeros((1, 2)), np.array([drive], np.float32), (1, 2))


def test_shares_weigh_the_blocks_by_what_they_do():
    strong, idle = block([[3, -3], [1, 1], [0, 0], [0, 0], [0, 0]]), block([[0, 0]] * 5)
    assert g.cell_shares([strong, idle]).tolist() == [[0.75, 0.25, 0, 0, 0]]
    assert g.cell_shares([idle]).tolist() == [[0] * 5]


def test_cells_are_split_into_their_grids():
    grids = g.split_cells(np.arange(21), (1, 2, 4))
    assert [grid.shape for grid in grids] == [(1, 1), (2, 2), (4, 4)]
    assert grids[1].tolist() == [[1, 2], [3, 4]] and grids[2][3, 3] == 20
