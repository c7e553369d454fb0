import json

import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError
from hga_flax.models import model_names
from hga_flax.pictures.networks import chosen, lines, row


def test_a_row_has_the_exact_counts():
    found = row("resnet18", "hga", 64)
    assert found["params"] == 11_689_512
    # Eq. 12 on 32 channels and the two FCs, in two blocks of each width.
    assert found["added_params"] == sum(2 * (84 * 32 + 11 * 32 * 32 // 2 + 64 * c) for c in (64, 128, 256, 512))
    assert 0 < found["added_conv_fc_macs"] < found["conv_fc_macs"] < 1e9 * found["gflops"]


def test_names_are_chosen_by_patterns_in_their_order():
    assert chosen([]) == model_names()
    assert chosen(["resnet34", "resnet18"]) == ["resnet18", "resnet34"]
    assert chosen(["vgg1[19]_bn"]) == ["vgg11_bn", "vgg19_bn"]
    assert chosen(["cifar_resnet20", "resnet18"]) == ["resnet18", "cifar_resnet20"]
    with pytest.raises(UserError, match=r"no network is called 'resnet19'; did you mean 'resnet1"):
        chosen(["resnet19"])


def test_the_table_is_markdown():
    numbers = {"params": 1000, "conv_fc_macs": 2 * 10**9, "added_params": 50, "added_conv_fc_macs": 10**7}
    head, rule, first = lines([{"network": "resnet18", "attention": "se", **numbers}])
    assert head.count("|") == rule.count("|") == first.count("|") == 8
    assert " ".join(first.split()) == "| `resnet18` | 1,000 | 2.000 | +50 | +5.0% | +0.0100 | +0.5% |"


def test_the_command(capsys):
    main(["networks", "resnet18", "--attention=se", "--image-size=32", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["network"], found["attention"], found["image_size"]) == ("resnet18", "se", 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vgg11", "--attention=sk"], "--attention=sk: none of these networks has a place for it"),
        (["vgg11", "--attention=sk", "--json"], "--attention=sk: none of these networks has a place for it"),
        (["vgg11", "--attention=sf"], "unknown attention 'sf'; did you mean 's"),
        (["vgg11", "--image-size=16"], "--image-size=16: vgg11 needs at least 32"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["networks", *arguments])
