"""Every shipped configuration loads, is complete and says how it is used; every key is read."""

import io
import pathlib
import re
import tokenize

import pytest

from configs import base
from hga_flax.config import config_keys, load_config, validate

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name not in ("__init__.py", "base.py"))


def code_only(path):
    """The file without its strings and comments; a key that is a Python keyword is read by subscript."""
    text = path.read_text().replace('.init["from"]', ".init.from")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = " ".join(t.string for t in tokens if t.type not in (tokenize.STRING, tokenize.COMMENT))
    return code.replace(" . ", ".")


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_a_shipped_configuration_is_valid_and_headed_by_its_command(file):
    config = validate(load_config(str(file)))
    assert config_keys(config) == config_keys(base.get_config())
    assert f"python train.py --config={file.relative_to(ROOT)}" in file.read_text()


def test_every_declared_key_is_read_and_every_read_key_is_declared():
    code = "\n".join(code_only(p) for p in (ROOT / "hga_flax").rglob("*.py"))
    keys = config_keys(base.get_config())
    unread = [k for k in keys if not re.search(rf"\b{re.escape(k)}\b" if "." in k else rf"\bconfig\.{k}\b", code)]
    # `mean` and `std` are also read as config.data[key]; the rest by name alone.
    assert not unread
    groups = {k.split(".")[0] for k in keys if "." in k}
    read = re.findall(rf"\bconfig\.({'|'.join(groups)})\.(\w+)", code)
    assert not {f"{g}.{k}" for g, k in read} - set(keys)


def test_no_key_is_read_with_a_default():
    for path in [*(ROOT / "hga_flax").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"]:
        assert not re.search(r"\bconfig(\.\w+)*\.get\(", code_only(path)), path


def test_every_key_has_a_comment_or_a_name_that_says_it():
    lines = (ROOT / "configs" / "base.py").read_text().splitlines()
    bare = [
        x.strip() for x in lines if re.match(r"\s+config\.\w+(\.\w+)? = ", x) and "#" not in x and "ConfigDict" not in x
    ]
    assert bare == ["config.optimizer.momentum = 0.9", "config.optimizer.nesterov = False"]
