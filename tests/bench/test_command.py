import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError


def test_a_table_of_a_small_data_set(capsys):
    main(["bench", "input", "--config=configs/digits.py", "--seconds=0.1"])
    out = capsys.readouterr().out
    assert "hga_flax" in out and "batching 100%" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py", "--compare"], "needs --config.data.fake=true"),
        (["--config=configs/digits.py", "--config.data.nam=x"], "did you mean 'data.name'"),
        (["--config=configs/none.py"], "no such file"),
        (["--config=configs/digits.py", "--seconds=0"], "--seconds=0: must be positive"),
        (["--config=configs/digits.py", "--seconds=nan"], "--seconds=nan: must be positive"),
        (["--config=configs/digits.py", "--seconds=inf"], "--seconds=inf: must be positive"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["bench", "input", *arguments])


def test_names_may_have_blanks_between_them(monkeypatch, capsys):
    named = []
    monkeypatch.setattr("hga_flax.bench.step.bench_step", lambda models, *more: named.extend(models) or [])
    monkeypatch.setattr("hga_flax.bench.attention.bench_attention", lambda names, *more: named.extend(names) or [])
    for module in ("step", "attention"):
        monkeypatch.setattr(f"hga_flax.bench.{module}.table", lambda rows: "")
    main(["bench", "step", "--models=resnet18:se, resnet18:hga"])
    main(["bench", "attention", "--attentions=se, hga"])
    assert named == ["resnet18:se", "resnet18:hga", "se", "hga"]


def test_a_command_without_a_configuration_refuses_its_keys():
    with pytest.raises(UserError, match="prepare takes no configuration"):
        main(["prepare", "cifar10", "--config.seed=1"])
