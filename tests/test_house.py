"""The rooms of the package stand in one order, and every import points to an earlier room or stays in its own."""

import ast

import pytest

from tests.commands import ROOT

PACKAGE = ROOT / "hga_flax"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room imports only rooms before it in this list. docs/design.md has the same list and says what is in each.
ROOMS = (
    "attention", "models", "pretrained", "counting", "config", "storage", "images", "data", "processes", "runs",
    "training", "inference", "paper", "pictures", "bench", "lab",
)  # fmt: skip
GROUND = ("errors", "platforms", "version")  # files that everybody may import, and that import nothing of the project
FRONT_DOOR = ("__init__", "__main__")  # files that import what is asked for, when it is asked for
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 15, 2800, 400, 100


def module(path):
    """The name of a file's module, without the package's: "runs.workdir"; of a room's __init__ that of the room."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def names(path):
    """What a file imports, wherever in it, as dotted names; `from a import b` gives "a" and "a.b"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write the whole name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported(path):
    """The modules of the package that a file imports; a room's __init__ where it takes a name from the room itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if name.removeprefix("hga_flax.") in MODULES}
            found |= modules | ({node.module} if modules != inside else set())
    ours = {name.removeprefix("hga_flax.") for name in found if name.startswith("hga_flax.")}
    return {name for name in ours if name in MODULES}


def room(name):
    return name.split(".")[0]


def importers(package):
    """The files, as paths in the package, that import a package of others or a part of it."""
    return {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name == package or name.startswith(package + ".") for name in names(path))
    }


def circle(graph):
    """Returns nodes of a graph that lead back to themselves."""

    def reached(start):
        seen, open_ = set(), list(graph[start])
        while open_:
            if (node := open_.pop()) not in seen:
                seen.add(node)
                open_ += graph[node]
        return seen

    return [node for node in graph if node in reached(node)]


def test_the_list_has_every_room_and_file():
    assert {room(name) for name in MODULES} == {*ROOMS, *GROUND, *FRONT_DOOR}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FRONT_DOOR])
def test_every_import_points_to_an_earlier_room_or_its_own(name):
    order = {other: i for i, other in enumerate((*GROUND, *ROOMS))}
    for other in imported(MODULES[name]):
        allowed = room(name) not in GROUND and (room(other) in GROUND or order[room(other)] <= order[room(name)])
        assert allowed, f"hga_flax/{name.replace('.', '/')}.py imports {other}, which comes later in ROOMS"


def test_attention_stands_alone():
    attention = [name for name in MODULES if room(name) == "attention"]
    assert {room(other) for name in attention for other in imported(MODULES[name])} <= {"attention", *GROUND}


def test_no_files_import_each_other_in_a_circle():
    assert not circle({name: imported(path) for name, path in MODULES.items() if name not in FRONT_DOOR})


def test_no_room_file_or_function_is_too_large():
    for name in ROOMS:
        files = [path for path in FILES if room(module(path)) == name]
        assert len(files) <= MOST_FILES, f"{name}/ has {len(files)} files"
        lines = sum(len(path.read_text().splitlines()) for path in files)
        assert lines <= MOST_LINES, f"{name}/ has {lines} lines"
    for path in FILES:
        assert len(path.read_text().splitlines()) <= MOST_LINES_OF_A_FILE, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= MOST_LINES_OF_A_FUNCTION, (path, node.name)


def test_the_table_of_rooms_in_the_documentation_is_this_list():
    table = (ROOT / "docs" / "design.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `hga_flax/")]
    assert rows == [f"`hga_flax/{name}/`" for name in ROOMS]


def test_each_room_says_what_it_is_and_where_to_start():
    for name in ROOMS:
        text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
        assert text and "Start at " in text, name
        for word in text.partition("Start at ")[2].replace(",", " ").replace(";", " ").split():
            assert not word.endswith(".py") or (PACKAGE / name / word).is_file(), (name, word)


def test_each_module_has_a_test_file_of_its_name():
    for name in MODULES:
        if room(name) in ROOMS and "." in name:
            folder, file = name.split(".")
            assert (ROOT / "tests" / folder / f"test_{file}.py").is_file(), name


def test_tests_stand_where_their_modules_stand():
    for path in (ROOT / "tests").glob("*/test_*.py"):
        folder = path.parent.name
        if folder in ROOMS:
            assert (PACKAGE / folder / path.name.removeprefix("test_")).is_file() or path.name in WHOLE, path


WHOLE = {"test_lowering.py", "test_old_workdir.py", "test_same_data.py"}  # of several modules together


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("orbax", {"runs/checkpoints.py"}),
        ("tensorboardX", {"runs/writers.py"}),
        ("onnx", {"inference/to_onnx.py"}),
        ("onnxruntime", {"inference/export.py"}),
        ("fsspec", {"storage/buckets.py"}),
        (
            "jax._src",
            {"processes/coordination.py"},
        ),  # private; test_coordination.py looks after it
    ],
)
def test_a_package_that_has_one_home(package, homes):
    assert importers(package) == homes


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("grain", {"data"}),
        ("tensorflow_datasets", {"data"}),
        ("cv2", {"images", "data", "bench"}),
        ("simplejpeg", {"images"}),
        ("matplotlib", {"pictures"}),
    ],
)
def test_a_package_that_has_one_room(package, rooms):
    assert {path.split("/")[0] for path in importers(package)} == rooms


def test_tensorflow_is_not_imported_when_a_module_is():
    for path in FILES:
        top = {alias.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)
               for alias in node.names}  # fmt: skip
        assert "tensorflow" not in top, path


FOLDERS = ("benchmarks", "configs", "examples", "hga_flax", "studies", "tests")
PROGRAMS = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in ROOT.joinpath(folder).rglob("*.py"))])


def defined(path):
    """The names that a module has at its top level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def test_every_name_that_is_imported_exists():
    """Also where it is imported only when it is needed."""
    known = {f"hga_flax.{name}": defined(path) for name, path in MODULES.items() if name}
    for path in PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                parts = {name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == node.module}
                missing = {alias.name for alias in node.names} - known[node.module] - parts
                assert not missing, f"{path}: {node.module} has no {', '.join(missing)}"
