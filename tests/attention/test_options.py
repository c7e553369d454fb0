from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hga_flax.attention import attention_names, attention_options
from hga_flax.attention.hga import HGA
from hga_flax.attention.options import check_types, fits
from hga_flax.attention.registry import attention_factory


@pytest.mark.parametrize(
    ("declared", "right", "wrong"),
    [
        (int, [0, -3], [1.0, True, "1", None, 2**31]),
        (float, [0, 0.5], [True, "1", float("nan"), float("inf")]),
        (bool, [True], [1, "True", None]),
        (str, ["a"], [1, None]),
        (int | None, [None, 3], ["x", 1.5, False]),
        (Sequence[int], [(), (1, 2), [3]], [1, (1.5,), ("a",), "12"]),
        (Any, [1, "a", None], []),
        (Callable[..., Any], [print], []),
    ],
)
def test_values_fit_their_declared_type(declared, right, wrong):
    assert all(fits(value, declared) for value in right)
    assert not any(fits(value, declared) for value in wrong)


def test_the_message_names_option_value_and_type():
    with pytest.raises(ValueError, match=r"^attention 'hga': option kernels=7 must be of type Sequence\[int\]$"):
        check_types("attention 'hga'", HGA, {"kernels": 7})
    with pytest.raises(ValueError, match=r"option mfe_act=1 must be of type str \| None$"):
        check_types("attention 'hga'", HGA, {"mfe_act": 1})
    with pytest.raises(ValueError, match=r"option reduction='x' must be of type int$"):
        check_types("attention 'hga'", HGA, {"reduction": "x"})


@pytest.mark.parametrize("name", attention_names())
def test_every_default_has_its_declared_type_and_no_option_takes_everything(name):
    options = attention_options(name)
    attention_factory(name, **options)
    for option in options:
        with pytest.raises(ValueError, match=f"option {option}="):
            attention_factory(name, **{option: {"no": "option is a dictionary"}})
