import argparse

import pytest

from configs import base
from hga_flax.config import loading as c
from hga_flax.errors import ConfigError, UserError, one_line

DIGITS = "configs/digits.py"


def parse(*arguments, file=DIGITS):
    _, config = c.parse_arguments(argparse.ArgumentParser(), [f"--config={file}", *arguments])
    return c.validate(config)


def test_overrides_take_the_type_of_the_default():
    config = parse(
        "--config.optimizer.learning_rate=1",
        "--config.data.fake",
        "--config.data.mean=0.1,0.2",
        "--config.seed",
        "7",
        "--config.model.attention_options=kernels=(7,), mfe_act='relu'",
        "--config.schedule.decay_at_steps=(3, 4)",
        "--config.schedule.name=step",
    )
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.data.fake is True and config.data.mean == (0.1, 0.2) and config.seed == 7
    assert config.schedule.decay_at_steps == (3, 4)
    assert c.parse_options(config.model.attention_options, "x") == {"kernels": (7,), "mfe_act": "relu"}
    assert c.parse_options("kernels=[3, 5], x=[[1]]", "x") == {"kernels": (3, 5), "x": ((1,),)}  # modules are hashed


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("stem*", ("stem*",)),
        ("stem*,stage[12]*", ("stem*", "stage[12]*")),
        ("('stem*', 'classifier')", ("stem*", "classifier")),
        ("", ()),
        ("()", ()),
    ],
)
def test_patterns_need_no_quotes(text, patterns):
    assert parse(f"--config.optimizer.freeze={text}").optimizer.freeze == patterns


def test_a_key_may_be_a_keyword_of_python():
    for key in ("init.weights", "init.from"):  # its former name
        assert parse(f"--config.{key}=runs/digits@3").init.weights == "runs/digits@3"


MISTAKES = {
    "--config.optimzer.learning_rate=1": "--config.optimzer.learning_rate: there is no such key; "
    "did you mean 'optimizer.learning_rate'?",
    "--config.optimizer.learning_rate=fast": "--config.optimizer.learning_rate=fast: must be a number",
    "--config.training.steps=1.5": "--config.training.steps=1.5: must be a whole number",
    "--config.data.fake=maybe": "--config.data.fake=maybe: must be True or False",
    "--config.data.mean=(0.5": "data.mean=('(0.5',): must be one number for all channels or one for each",
    "--config.model.name=resnet500": "unknown model 'resnet500'; did you mean 'resnet50'?",
    "--config.model.name=cifar_resnet21": "depth 21 is not 6n + 2",
    "--config.model.attention=hgaa": "unknown attention 'hgaa'; did you mean 'hga'?; known: none, hga",
    "--config.model.attention_options=kernel=(7,)": "no option 'kernel'; did you mean 'kernels'?; it has: ",
    "--config.model.attention_options=kernels": "write keyword arguments",
    "--config.model.attention_options=kernels=open('x')": "write keyword arguments",
    "--config.model.attention_options=kernels=(7,))(mfe_act='relu'": "write keyword arguments",
    "--config.model.attention_options=**{'a': 1}": "write keyword arguments",
    "--config.model.attention_options=a=1, a=2": "write keyword arguments",
    "--config.model.attention_options=kernels=" + 5000 * "(": "write keyword arguments",
    "--config.model.attention_options=kernels=" + 2000 * "-" + "1": "write keyword arguments",
    "--config.model.attention_options=kernels={[]: 1}": "write keyword arguments",
    "--config.model.options=width=3": "has no option 'width'",
    "--config.model.options=num_classes=3": "config.model.options: num_classes is not an option; the run sets it",
    "--config.model.options=features=0": "model 'cifar_resnet20': features=0 is not positive",
    "--config.model.attention_options=name='x'": "attention_options: name is not an option; the run sets it",
    "--config.model.dtype=float16": "model.dtype='float16'; did you mean",
    "--config.schedule.name=steps": "schedule.name='steps'; did you mean 'step'?",
    "--config.training.epochs=-1": "training.epochs=-1.0: must be above 0",
    "--config.training.epochs=nan": "training.epochs=nan: must be above 0",
    "--config.training.batch_size=0": "training.batch_size=0: must be at least 1",
    "--config.optimizer.momentum=1.5": "optimizer.momentum=1.5: must be at least 0 and at most 0.99999",
    "--config.data.std=0": "data.std=(0,): must be one number",
    "--config.data.augmentation=none": "data.crop_padding=2: only data.augmentation='small'",
    "--config.schedule.decay_at_steps=(0,)": "schedule.decay_at_steps=(0,): must be positive whole numbers",
    "--config.schedule.decay_at_steps=3,x": "schedule.decay_at_steps=('3,x',): must be positive whole numbers",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(argument):
    with pytest.raises(ConfigError) as caught:
        parse(argument)
    assert MISTAKES[argument] in str(caught.value)
    assert one_line(caught.value) == str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("8", "x"), ("x", "8")])
def test_of_a_key_given_twice_the_wrong_value_is_named(first, second):
    with pytest.raises(ConfigError, match=r"^--config\.seed=x: must be a whole number$"):
        parse(f"--config.seed={first}", "--config.optimizer.momentum=0.5", f"--config.seed={second}")
    assert parse("--config.seed=1", "--config.seed=2").seed == 2


def test_a_group_is_not_a_key():
    with pytest.raises(ConfigError, match=r"it is a group: optimizer\.b1, optimizer\.b2, optimizer\.clip_norm"):
        parse("--config.optimizer=sgd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        (
            "from configs import base\ndef get_config():\n  c = base.get_config()\n  c.optimzer = 1\n  return c",
            "optimzer",
        ),
        (
            "from configs import base\ndef get_config():\n  c = base.get_config()\n  c.seed = 'x'\n  return c",
            "TypeError",
        ),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config():\n  return {}", "returns dict"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        parse(file=str(file))
    assert one_line(caught.value) == str(caught.value) and str(file) in str(caught.value)


def test_json_holds_the_whole_configuration(monkeypatch):
    config = parse()
    monkeypatch.setattr(c, "_run_file", lambda *args: 1 / 0)  # an installed package has no configs/ to read
    again = c.from_json(c.to_json(config))
    assert again.to_dict() == config.to_dict() and again.is_locked
    with pytest.raises(UserError, match="not a configuration"):
        c.from_json("{")
    with pytest.raises(UserError, match="not a configuration"):
        c.from_json("3")


def test_differences():
    assert c.differences(parse(), parse("--config.seed=3")) == ["seed: 0 -> 3"]
    shorter = c.from_json('{"seed": 0}')
    assert "model.name: (absent) -> resnet50" in c.differences(shorter, base.get_config())


def test_a_recipe_comes_between_the_file_and_the_overrides(tmp_path):
    config = parse("--recipe=modern-100", "--config.training.epochs=7", "--config.optimizer.b1=0.8")
    assert config.optimizer.name == "lamb" and config.training.epochs == 7 and config.optimizer.b1 == 0.8
    assert config.model.name == "cifar_resnet20"
    mine = tmp_path / "mine.py"
    mine.write_text("def apply(config):\n    config.seed = config.seed + 3\n")
    assert parse(f"--recipe={mine}").seed == 3
    mine.write_text("def apply(config):\n    config.sed = 3\n")
    for arguments, message in [
        ([f"--recipe={mine}"], f"--recipe={mine}: AttributeError: "),
        (
            ["--recipe=modern-10"],
            "--recipe=modern-10: no such recipe; did you mean 'modern-100'?; there are: modern-100",
        ),
        (["--recipe=none.py"], "--recipe=none.py: no such file"),
        (["--recipe=paper", "--config.optimizer.b1=0.8"], "optimizer.b1=0.8 has no effect: "),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse(*arguments)
        assert str(caught.value).startswith(message) and one_line(caught.value) == str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("training.steps=1e3", 1000),
        ("training.steps=1_000", 1000),
        ("training.steps=2.5e4", 25000),
        ("training.steps=7.0", 7),
        ("seed= 12 ", 12),
        ("schedule.decay_at_steps=", ()),
        ("schedule.decay_at_steps=()", ()),
        ("schedule.decay_at_steps=[]", ()),
        ("schedule.decay_at_steps=1e3,2_000", (1000, 2000)),
        ("schedule.decay_at_steps=(32e3, 48e3)", (32000, 48000)),
        ("schedule.decay_at_steps=5", (5,)),
        ("optimizer.freeze=", ()),
    ],
)
def test_whole_numbers_and_empty_lists_as_people_write_them(argument, value):
    read = c.get_key(c.override(base.get_config(), [f"--config.{argument}"]), argument.split("=")[0])
    assert read == value and [type(v) for v in (read if isinstance(read, tuple) else [read])] in (
        [int] * (len(read) if isinstance(read, tuple) else 1),
    )


@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "inf", "1e400", "1e999999999", "", "1e3x"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(ConfigError, match=f"^--config.training.steps={text}: must be a whole number$"):
        c.override(base.get_config(), [f"--config.training.steps={text}"])


def test_a_folder_is_no_configuration(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return None\n")
    (tmp_path / "script.py").write_text("print()\n")
    with pytest.raises(ConfigError, match=rf"^--config={tmp_path}: this is a folder; there are: mine\.py$"):
        c.load_config(str(tmp_path))
    with pytest.raises(ConfigError, match=r"/absent\.py: no such file; there are: mine\.py$"):
        c.load_config(str(tmp_path / "absent.py"))
