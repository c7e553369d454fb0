"""Ours against known counts, and the command's output."""

import json

import jax
import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError
from hga_flax.models import create_model
from hga_flax.paper import command as paper
from hga_flax.paper.published import TABLES

CONV = {"form": "conv"}
HGA_MILLIONS = {
    "resnet50": 26.657,
    "resnet101": 46.904,
    "resnet152": 63.673,
    "resnext50_32x4d": 26.129,
    "resnext101_32x4d": 46.533,
}
# osmr/imgclsmob's pre-activation networks, and SE of ratio 16 with biases in them.
CIFAR10 = {
    ("cifar_preact_resnet110", "none"): 1_730_522,
    ("cifar_preact_resnet164_bottleneck", "none"): 1_703_258,
    ("cifar_preact_resnet110", "se"): 1_744_760,
    ("cifar_preact_resnet164_bottleneck", "se"): 1_905_362,
}


def check_table2(rows):
    for row in rows:
        if row["attention"] == "none":
            assert int(row["gflops"] * 100) / 100 == row["paper_gflops"]
            assert int(row["params"] / 1e4) / 100 == row["paper_params_m"]
        elif row["attention"] == "hga":
            assert round(row["params"] / 1e6, 3) == HGA_MILLIONS[row["model"]]
        else:
            assert round(row["params"] / 1e6, 2) == row["paper_params_m"]
            if row["model"] != "resnext101_32x4d":
                assert abs(row["gflops_with_pooling"] - row["paper_gflops"]) < 0.01


def network_rows(table, *models):
    return [paper._network_row(row, {}) for row in TABLES[table][1]() if row.model in models]


@pytest.mark.medium
def test_table2_of_the_smallest_network():
    rows = network_rows("table2", "resnet50")
    assert len(rows) == 3
    check_table2(rows)
    assert [round(row["gflops"], 3) for row in rows if row["attention"] == "hga"] == [4.326]
    assert all(row["gflops_shift"] < row["gflops"] for row in rows if row["attention"] != "none")


@pytest.mark.slow
def test_table2_whole():
    rows = paper.make_rows("table2")
    assert len(rows) == 15
    check_table2(rows)
    ours = [round(row["gflops"], 3) for row in rows if row["attention"] == "hga"]
    assert ours == [4.326, 8.168, 12.044, 4.474, 8.346]


def test_table3_se_cut_as_the_paper_cuts_and_sk_by_the_sknet_papers_count():
    rows = [row for row in network_rows("table3", "resnext50_32x4d") if row["attention"] in ("se", "sk")]
    assert [row["attention"] for row in rows] == ["se", "sk"]
    assert int(rows[0]["gflops"] * 100) / 100 == rows[0]["paper_gflops"]
    assert (rows[1]["params"], rows[1]["conv_fc_macs"]) == (27_479_784, 4_462_710_784)
    assert rows[1]["gflops_difference"] == pytest.approx(4.462710784 - 4.47)


@pytest.mark.parametrize(("model", "attention"), CIFAR10)
def test_table4_has_the_published_parameters(model, attention):
    params = paper.count(model, attention, {}, "cifar10").params
    assert params == CIFAR10[model, attention]
    assert any((row.model, row.attention) == (model, attention) for row in TABLES["table4"][1]())


def test_table4_hga_adds_what_eq_12_and_the_two_fcs_say():
    plain = paper.count("cifar_preact_resnet110", "none", {}, "cifar10").params
    # 18 blocks of 16, 32 and 64 channels: HGA(16), HGA(32), and HGA(64, 32, 64) with its FCs.
    eq12 = {c: 84 * c + 11 * c * c // 2 for c in (16, 32)}
    added = 18 * (eq12[16] + eq12[32] + eq12[32] + 2 * 64 * 32)
    assert paper.count("cifar_preact_resnet110", "hga", CONV, "cifar10").params == plain + added


@pytest.mark.parametrize("table", ["table5", "table6"])
def test_every_ablation_is_a_network_of_its_own(table):
    rows = [row for row in TABLES[table][1]() if row.model == "resnet101"]
    trees = set()
    for row in rows:
        # ResNet-101 of one block per stage: the same attention, a third of the time.
        model = create_model(row.model, attention=row.attention, attention_options=row.options, stage_sizes=(1, 1))
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
        variables = jax.eval_shape(lambda images, model=model: model.init(jax.random.key(0), images), images)
        jaxpr = jax.make_jaxpr(model.apply)(variables, images)
        trees.add((str(jax.tree.structure(variables)), str(jaxpr)))
    assert len(trees) == len(rows)


def test_the_last_row_of_table5_is_the_plain_network():
    for row in TABLES["table5"][1]():
        if not row.label:
            shapes = [
                jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), images)
                for model in (
                    create_model(row.model, attention=row.attention, attention_options=row.options),
                    create_model(row.model),
                )
                for images in [jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")]
            ]
            assert shapes[0] == shapes[1]


def test_table1_prints_the_misprinted_blocks_and_ours():
    rows = [row for row in paper.make_rows("table1") if row["model"] == "resnet50"]
    assert [row["blocks"] for row in rows] == 2 * [3, 4, 6, 3]
    assert [row["paper_blocks"] for row in rows] == [3, 4, 6, 6, 3, 4, 4, 4]
    for row in rows:
        assert row["layers"] == row["paper_layers"]
        assert row["output_size"] == row["paper_output_size"]
        assert bool(row["notes"]) == (row["blocks"] != row["paper_blocks"])


JSON_KEYS = {
    *("table", "model", "attention", "params", "conv_fc_macs", "bn_elements", "gflops"),
    *("paper_params_m", "paper_gflops", "paper_top1_error"),
}


def test_json_is_a_list_of_rows_with_the_promised_keys(no_tracing, capsys):
    for table, count in {"table2": 15, "table3": 17, "table4": 12, "table5": 16, "table6": 10}.items():
        assert main(["paper", table, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert len(rows) == count
        assert all(set(row) >= JSON_KEYS and row["table"] == table for row in rows)


def test_equations_print_equal_and_in_json_have_the_promised_keys(capsys):
    assert main(["paper", "equations", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) >= JSON_KEYS for row in rows)
    assert {(row["equation"], row["channels"]) for row in rows if row["difference"] == 0} == {
        (equation, channels) for equation in ("8", "9", "10", "12") for channels in (32, 64, 256)
    }


@pytest.mark.parametrize("table", ["table1", "equations"])
def test_results_of_a_table_without_errors_are_refused(table, tmp_path):
    with pytest.raises(UserError, match=f"x.json: {table} shows no errors of networks"):
        main(["paper", table, f"--results={tmp_path}/x.json"])


def test_an_equation_that_does_not_hold_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr("hga_flax.paper.equations.hga_params", lambda channels: 1)
    assert main(["paper", "equations"]) == 1
    assert "+8,319" in capsys.readouterr().out
