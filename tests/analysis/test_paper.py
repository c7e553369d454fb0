"""The paper's figures against its own arithmetic, ours against known counts, and the command's output."""

import json

import jax
import pytest

from hga_flax.__main__ import main
from hga_flax.analysis import paper, results
from hga_flax.analysis.complexity import Complexity
from hga_flax.analysis.paper_data import ABSTRACT, TABLE2, TABLE3, TABLE5, TABLE6, TABLES, Row
from hga_flax.errors import UserError
from hga_flax.models import create_model

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


@pytest.fixture
def no_tracing(monkeypatch):
    """Tables of made-up counts: for tests of all but the counts."""
    counted = Complexity(1_000_000, 2, 3 * 10**9, 4, 5, 6)
    monkeypatch.setattr(paper, "count", lambda *arguments: counted)


# The figures as printed.


def test_the_printed_deltas_are_differences_of_the_printed_errors():
    for error in ("top1", "top5"):
        pairs = zip(TABLE2["hga"][f"{error}_error"], TABLE2["none"][f"{error}_error"], strict=True)
        assert TABLE2["hga"][f"{error}_delta"] == tuple(round(ours - plain, 2) for ours, plain in pairs)
    for attention in ("se", "hga"):
        pairs = zip(TABLE3[attention]["top1_error"], TABLE3["none"]["top1_error"], strict=True)
        assert TABLE3[attention]["top1_delta"] == tuple(round(ours - plain, 2) for ours, plain in pairs)


def test_sks_printed_deltas_are_not_as_the_note_says():
    plain = TABLE3["none"]["top1_error"][3:]
    differences = [round(sk - p, 2) for sk, p in zip(TABLE3["sk"]["top1_error"][3:], plain, strict=True)]
    assert differences == [-1.32, -0.99]
    assert TABLE3["sk"]["top1_delta"][3:] == (-1.23, -0.84)


def test_the_abstracts_averages_follow_from_table_2():
    computed = paper.averages()
    assert round(computed["top1_error"], 2) == ABSTRACT["top1_error"]
    assert round(computed["top5_error"], 2) == ABSTRACT["top5_error"]
    assert int(computed["gflops"] * 100) / 100 == ABSTRACT["gflops"]  # 6.2378, cut


def test_the_tables_agree_where_they_print_the_same_network():
    assert TABLE2["hga"]["gflops"] == TABLE3["hga"]["gflops"]
    for i, network in enumerate((1, 4)):
        for table, full in ((TABLE5, (True, True, True)), (TABLE6, (1, 3, 5, 7))):
            assert table[full][i] == (TABLE2["hga"]["top1_error"][network], TABLE2["hga"]["top5_error"][network])
        plain = TABLE5[False, False, False][i]
        assert plain == (TABLE2["none"]["top1_error"][network], TABLE2["none"]["top5_error"][network])


# Ours.


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


def test_table2_of_the_smaller_networks():
    rows = network_rows("table2", "resnet50", "resnext50_32x4d")
    assert len(rows) == 6
    check_table2(rows)
    assert [round(row["gflops"], 3) for row in rows if row["attention"] == "hga"] == [4.326, 4.474]
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


# The command.

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


def test_an_equation_that_does_not_hold_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr("hga_flax.analysis.equations.hga_params", lambda channels: 1)
    assert main(["paper", "equations"]) == 1
    assert "+8,319" in capsys.readouterr().out


def test_printed_tables_cut_nothing_and_say_what_was_not_run(no_tracing, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    for table in TABLES:
        assert main(["paper", table]) == 0
        printed = capsys.readouterr().out
        assert "…" not in printed
        assert "not run" in printed


# Results.

RUN = {
    "model": "resnet101",
    "attention": "hga",
    "dataset": "imagenet2012",
    "top1_error": 21.37,
    "command": "python ...",
}


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def errors_of(table, file):
    return {
        (row["model"], row["attention"], row["label"]): row["top1_error"]
        for row in paper.make_rows(table, file)
        if row["top1_error"] is not None
    }


def test_a_result_appears_in_every_table_that_has_its_network(no_tracing, tmp_path):
    file = write(tmp_path / "r.json", RUN)
    assert errors_of("table2", file) == {("resnet101", "hga", ""): 21.37}
    assert errors_of("table3", file) == {("resnet101", "hga", ""): 21.37}
    assert errors_of("table4", file) == {}
    assert errors_of("table5", file) == {("resnet101", "hga", "MFE HAP EE"): 21.37}
    assert errors_of("table6", file) == {("resnet101", "hga", "1x1, 3x3, 5x5, 7x7"): 21.37}


def test_results_of_plain_networks_and_of_options_find_their_rows(no_tracing, tmp_path):
    kernels = RUN | {"attention_options": {"kernels": [7], "form": "shift"}, "top1_error": 22.0}
    file = write(tmp_path / "r.json", RUN | {"attention": "none", "top1_error": 23}, kernels)
    assert errors_of("table5", file) == {("resnet101", "hga", ""): 23}
    assert errors_of("table6", file) == {("resnet101", "hga", "7x7"): 22.0}


def test_the_default_file_is_read_where_it_exists(no_tracing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert errors_of("table2", None) == {}
    write(tmp_path / results.DEFAULT_FILE, RUN)
    assert errors_of("table2", None) == {("resnet101", "hga", ""): 21.37}
    assert main(["paper", "table2"]) == 0
    assert " 21.37" in capsys.readouterr().out


BAD_RESULTS = {
    "lacks 'command'": {key: value for key, value in RUN.items() if key != "command"},
    "'top_1'": RUN | {"top_1": 1.0},
    "not a percentage": RUN | {"top1_error": "21.37"},
    "unknown attention 'hag'": RUN | {"attention": "hag"},
    "no option 'kernel'": RUN | {"attention_options": {"kernel": [7]}},
    "no such network": RUN | {"model": "resnet18"},
    "must be a text": RUN | {"command": " "},
    "must be an object": RUN | {"attention_options": [7]},
}


@pytest.mark.parametrize("message", BAD_RESULTS)
def test_a_malformed_result_is_refused_with_its_row(no_tracing, tmp_path, message):
    file = write(tmp_path / "r.json", RUN, BAD_RESULTS[message])
    with pytest.raises(UserError, match=message) as caught:
        paper.make_rows("table2", file)
    assert "row 2" in str(caught.value)


def test_a_repeated_or_unreadable_result_is_refused(no_tracing, tmp_path):
    with pytest.raises(UserError, match="repeats"):
        paper.make_rows("table2", write(tmp_path / "r.json", RUN, RUN | {"attention_options": {"form": "conv"}}))
    with pytest.raises(UserError, match="cannot read"):
        paper.make_rows("table2", tmp_path / "absent.json")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(UserError, match="list of objects"):
        paper.make_rows("table2", tmp_path / "object.json")


def test_every_row_of_the_tables_is_a_network_that_can_be_made():
    for _, rows in TABLES.values():
        for row in rows():
            assert isinstance(row, Row)
            create_model(row.model, attention=row.attention, attention_options=row.options)
