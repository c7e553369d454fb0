"""The library's front door: every name is there, is documented and says its shapes, and none costs until it is used."""

import ast
import doctest
import inspect
import io
import re

import pytest

import hga_flax
from tests.commands import ROOT, run

NAMES = [name for name in hga_flax.__all__ if name != "__version__"]
CALLS = {"Predictor": "predict"}  # a class's method that does its work, where that is not __call__


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_imports_and_is_documented(name):
    thing = getattr(hga_flax, name)
    assert thing.__name__ == name
    # Not an empty string, and not what a dataclass makes up: "HGA(channels: int, ...)".
    assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), name
    if inspect.isclass(thing):
        call = getattr(thing, CALLS.get(name, "__call__")).__doc__ or thing.__doc__
        assert re.search(r"\[(B, )?H, W, |\[B, S, cells, C\]", thing.__doc__ + call), f"{name}: no shapes"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_function_and_the_fields_of_a_module_are_annotated(name):
    thing = getattr(hga_flax, name)
    function = getattr(thing, CALLS.get(name, "__call__")) if inspect.isclass(thing) else thing
    function = inspect.unwrap(function)
    for parameter in list(inspect.signature(function).parameters.values())[inspect.isclass(thing) :]:
        assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name})"
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty, name


def test_the_name_that_editors_see_is_the_one_that_is_given():
    program = ast.parse((ROOT / "hga_flax" / "__init__.py").read_text())
    (block,) = [node for node in program.body if isinstance(node, ast.If)]  # `if TYPE_CHECKING:`
    homes = {alias.name: line.module for line in block.body for alias in line.names}
    assert sorted(homes) == sorted(NAMES)
    for name, home in homes.items():
        assert getattr(hga_flax, name) is getattr(__import__(home, fromlist=[name]), name), name


def test_dir_lists_the_names_and_an_unknown_one_is_an_attribute_error():
    assert set(hga_flax.__all__) <= set(dir(hga_flax))
    with pytest.raises(AttributeError, match="no attribute 'HGB'"):
        _ = hga_flax.HGB


def test_importing_the_package_alone_loads_neither_jax_nor_anything_else_that_is_large():
    heavy = "{'jax', 'flax', 'numpy', 'orbax', 'grain', 'cv2', 'tensorflow_datasets', 'tensorflow'}"
    result = run("-c", f"import sys, hga_flax; dir(hga_flax); print({heavy} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stderr


@pytest.mark.medium
def test_a_program_may_set_up_its_logging_after_the_import():
    program = "import logging; from hga_flax import Predictor, restore_workdir; print(logging.root.handlers)"
    assert (result := run("-c", program)).stdout == "[]\n", result.stderr


def test_the_library_needs_no_data_package_for_attentions_and_networks():
    code = (
        "import sys, hga_flax; hga_flax.create_model('cifar_resnet8', attention='hga'); "
        "print({'orbax.checkpoint', 'grain', 'cv2', 'tensorflow_datasets', 'ml_collections', 'clu'} & set(sys.modules))"
    )
    result = run("-c", code)
    assert result.stdout == "set()\n", result.stderr


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "hga_flax" / "py.typed").read_text() == ""


# What `pip install .` does not bring: the packages of the extras [train] and [pictures].
EXTRAS = ("optax", "orbax", "tensorflow_datasets", "grain", "ml_collections", "clu", "fsspec", "cv2", "simplejpeg",
          "sklearn", "scipy", "tensorboardX", "matplotlib")  # fmt: skip
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); "


def test_attentions_and_networks_need_jax_flax_and_numpy_alone():
    code = "import jax, jax.numpy as jnp; from hga_flax import HGA, create_model, register_attention; "
    code += "m = create_model('cifar_resnet8', attention='hga', num_classes=3); "
    code += (
        "print(jax.eval_shape(m.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))['params']['classifier']['bias'].shape)"
    )
    result = run("-c", WITHOUT + code)
    assert (result.returncode, result.stdout) == (0, "(3,)\n"), result.stderr


def test_what_an_extra_lacks_is_said_in_one_line():
    result = run("-c", WITHOUT + "from hga_flax import Predictor")
    assert (
        "ImportError: hga_flax.Predictor: " in result.stderr and "pip install '.[train]' in the clone" in result.stderr
    )
    main = "from hga_flax.errors import run_main; from hga_flax.__main__ import main; "
    main += "run_main(lambda: main(['report', 'x']))"
    result = run("-c", WITHOUT + main)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: report: ") and "pip install '.[pictures]' in the clone" in result.stderr


@pytest.mark.parametrize("name", [name for name in hga_flax.__all__ if name != "__version__"])
def test_every_public_name_has_an_example_that_runs(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(hga_flax, name), name)
    assert test.examples, name
    report = io.StringIO()
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.write)
    assert not results.failed, report.getvalue()
