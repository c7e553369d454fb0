import json

import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError
from hga_flax.paper import command as paper
from hga_flax.paper import results

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
    "unknown attention 'hag'; did you mean 'hga'": RUN | {"attention": "hag"},
    "no option 'kernel'": RUN | {"attention_options": {"kernel": [7]}},
    "no such network": RUN | {"model": "resnet18"},
    "must be a string": RUN | {"command": " "},
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
