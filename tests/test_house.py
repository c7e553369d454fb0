"""The rooms keep to themselves: who may import what."""

import ast

import pytest

from tests.commands import ROOT

# Of `python -m hga_flax`, and the library's front door; train.py, evaluate.py and predict.py are outside the package.
TRAINING_COMMANDS = {
    "__init__.py", "bench/compile.py", "bench/topologies.py", "inference/export.py", "inference/export_weights.py",
}  # fmt: skip
TRAINING_ROOMS = {"training", "pictures", "lab"}  # pictures/ draws what runs left, lab/ makes many: commands, too
FILES = sorted((ROOT / "hga_flax").rglob("*.py"))


def imports(path):
    """Every module that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def importers(package):
    return {
        str(path.relative_to(ROOT / "hga_flax"))
        for path in FILES
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def room(path):
    return path.relative_to(ROOT / "hga_flax").parts[0]


def test_attention_imports_nothing_of_the_project_and_models_only_attention():
    for path in FILES:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("hga_flax.")}
        if room(path) == "attention":
            assert ours <= {"attention"}, path
        if room(path) == "models":
            assert ours <= {"attention", "models", "errors"}, path
        if room(path) not in TRAINING_ROOMS and str(path.relative_to(ROOT / "hga_flax")) not in TRAINING_COMMANDS:
            assert "training" not in ours, path


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("orbax", {"runs/checkpoints.py"}),
        ("tensorboardX", {"runs/writers.py"}),
        ("onnx", {"inference/to_onnx.py"}),
        ("onnxruntime", {"inference/export.py"}),
        ("fsspec", {"storage.py"}),
        ("etils", {"training/trainer.py"}),
        ("jax._src", {"processes/distributed.py"}),  # private names; tests/processes/test_distributed.py looks after it
    ],
)
def test_a_package_that_has_one_home(package, homes):
    assert importers(package) == homes


def test_grain_and_tfds_are_imported_in_data_alone():
    for package in ("grain", "tensorflow_datasets", "cv2"):
        assert {path.split("/")[0] for path in importers(package)} == {"data"}, package


def test_matplotlib_is_imported_in_pictures_alone_and_pictures_by_the_lab():
    assert {path.split("/")[0] for path in importers("matplotlib")} == {"pictures"}
    assert {path.split("/")[0] for path in importers("hga_flax.pictures")} == {"pictures", "lab"}


def test_tensorflow_is_needed_for_a_comparison_and_a_preparation_alone():
    assert importers("tensorflow") <= {"bench/input_peers.py", "data/prepare.py", "data/tfds_prepare.py"}
    for path in FILES:  # and nowhere when a module is imported
        top = {
            alias.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "tensorflow" not in top, path


def test_nothing_imports_the_lab_but_itself():
    for path in FILES:
        if room(path) != "lab":
            assert not any(name.startswith("hga_flax.lab") for name in imports(path)), path


def test_no_file_and_no_function_has_outgrown_its_room():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 100, (path, node.name)
