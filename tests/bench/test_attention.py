import json

import pytest

from hga_flax.__main__ import main
from hga_flax.attention import attention_names
from hga_flax.bench import attention as bench_attention
from hga_flax.errors import UserError


@pytest.mark.medium
def test_forms_of_hga_beside_se_at_every_stage(monkeypatch, capsys):
    assert [height * channels for height, channels in bench_attention.STAGES] == [56 * 256] * 4  # ResNet-50's
    monkeypatch.setattr(bench_attention, "STAGES", ((8, 64),))
    command = ["bench", "attention", "--attentions=hga,hga-conv,sk,se", "--batch=32", "--rounds=2"]
    main([*command, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["attention"] for row in rows] == ["se", "hga", "hga-conv", "sk"]
    assert [row["channels"] for row in rows] == [64, 64, 64, 16]  # SK in place of a 3x3 convolution
    by_name = {row["attention"]: row for row in rows}
    assert by_name["hga"]["params"] == by_name["hga-conv"]["params"] > by_name["se"]["params"] > 0
    # The convolutions' maps are never computed; the operator, which has the size of a few images, counts less.
    assert by_name["hga-conv"]["gradient_bytes"] > by_name["hga"]["gradient_bytes"]
    assert by_name["se"]["forward_ratio"] == by_name["se"]["gradient_ratio"] == 1
    for row in rows:
        assert 0 < row["forward_fastest_ms"] <= row["forward_ms"]
        assert 0 < row["forward_bytes"] < row["gradient_bytes"]
    table = bench_attention.table(rows)
    assert table.count("8x8x64") == 3 and table.count("8x8x16") == 1


def test_every_registered_attention_is_timed(monkeypatch):
    asked = []

    def build(name, *_):
        asked.append(name)
        return {"attention": name}, {kind: (lambda times: None, 1.0) for kind in ("forward", "gradient")}

    monkeypatch.setattr(bench_attention, "_build", build)
    rows = bench_attention.bench_attention(None, 1, "float32", 1, lambda line: None)
    assert set(asked) == {*attention_names(), "hga-conv"} and len(rows) == 4 * len(set(asked))


def test_unknown_attentions_are_refused():
    with pytest.raises(UserError, match=r"unknown attention 'hgaa'; did you mean 'hga'\?; known: none, hga"):
        main(["bench", "attention", "--attentions=hgaa"])
