"""Study files: what is refused in one line, what makes a run the same, and the shipped ones."""

import json
import pathlib

import pytest

from hga_flax.config.checks import check_keys, complete
from hga_flax.config.keys import ALWAYS, KEYS
from hga_flax.config.loading import load_config, parse_options, to_json
from hga_flax.errors import UserError
from hga_flax.lab import results, step_times
from hga_flax.lab.runs import write_text
from hga_flax.lab.study import changes, check_same_rows, identity, load_study, with_seed
from hga_flax.paper.published import TABLES
from hga_flax.paper.results import network_key
from tests.commands import ROOT
from tests.lab.made_up import ROWS, TINY, write_study

SHIPPED = sorted((ROOT / "studies").glob("*.py"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_python_file(tmp_path):
    study = load_study(write_study(tmp_path, about="What\n  it asks."))
    assert study.name == "made_up" and study.about == "What it asks." and study.seeds == (0, 1, 2)
    assert study.directory == pathlib.Path("runs/studies/made_up")
    assert [row.baseline for row in study.rows.values()] == [None, "none", "none"]
    row = study.rows["se"]
    assert row.config.model.attention == "se" and row.config.training.steps == 2 and row.config.seed == 0
    assert row.overrides == tuple(f"--config.{item}" for item in [*TINY, "model.attention=se"])


def test_flags_win_over_the_file_and_what_they_leave_without_effect_is_dropped(tmp_path):
    file = write_study(tmp_path, overrides=["model.name=cifar_resnet8", "training.epochs=6", "optimizer.nesterov=true"])
    flags = ["--config.training.steps=3", "--config.optimizer.name=adamw"]
    row = load_study(file, overrides=flags).rows["se"]
    assert row.overrides == ("--config.model.name=cifar_resnet8", "--config.model.attention=se", *flags)
    assert row.config.training.steps == 3 and row.config.optimizer.name == "adamw"
    idle = write_study(tmp_path, "idle", overrides=["training.epochs=6", "training.steps=4"])
    for given in ([], flags):  # the file's own mistakes are said
        with pytest.raises(UserError, match=r"row 'none': training.epochs=6.0 has no effect: training.steps"):
            load_study(idle, overrides=given)


def test_a_flag_for_a_key_that_the_rows_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--config.model.attention: applies to all rows, but row 'none' of .* has its"):
        load_study(write_study(tmp_path), overrides=["--config.model.attention=cbam"])


def test_a_toml_file_says_the_same(tmp_path):
    overrides, rows = (repr(TINY), "\n".join(f"{name} = {row!r}" for name, row in ROWS.items()))
    file = tmp_path / "made_up.toml"
    file.write_text(
        f'config = "configs/digits.py"\nbaseline = "none"\nseeds = [4, 2]\noverrides = {overrides}\n'
        f'directory = "elsewhere"\n[rows]\n{rows}\n'
    )
    study, same = load_study(str(file)), load_study(write_study(tmp_path))
    assert study.seeds == (4, 2) and study.directory == pathlib.Path("elsewhere")
    assert {n: to_json(r.config) for n, r in study.rows.items()} == {n: to_json(r.config) for n, r in same.rows.items()}
    assert load_study(str(file), "here").directory == pathlib.Path("here")


BAD = [
    ({"colour": 1}, "there is no key 'colour'"),
    ({"seed": 3}, "did you mean 'seeds'?"),
    ({"rows": {}}, "rows must be a dictionary"),
    ({"rows": {"a/b": []}, "baseline": "a/b"}, "row 'a/b': letters"),
    ({"rows": {"claims": []}, "baseline": "claims"}, "row 'claims'"),
    ({"rows": ROWS | {"none": "model.attention=none"}}, "row 'none': give a list"),
    ({"rows": ROWS | {"x": ["model.attention"]}}, "row 'x': '--config.model.attention' is not KEY=VALUE"),
    ({"rows": ROWS | {"x": ["model.attention=hgaa"]}}, "row 'x': config.model: unknown attention 'hgaa'"),
    ({"rows": ROWS | {"x": ["optimzer.momentum=0"]}}, "did you mean 'optimizer.momentum'?"),
    ({"rows": ROWS | {"x": ["model.attention=se"]}}, "rows 'se' and 'x' have the same configuration"),
    ({"rows": ROWS | {"x": ["seed=1"]}}, "row 'x': use the study's key 'seeds'"),
    ({"baseline": "plain"}, "there is no row 'plain'"),
    ({"baseline": {"se": "se"}}, "compared with itself"),
    ({"seeds": 0}, "seeds=0"),
    ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
    ({"seeds": [True]}, "seeds="),
    ({"seeds": [2**31]}, "seeds=.2147483648.: .* from 0 to 2147483647$"),
    ({"seeds": "3"}, "seeds='3'"),
    ({"budget_minutes": -1}, "budget_minutes=-1"),
    ({"config": "configs/absent.py"}, "no such file"),
    ({"name": "a b"}, "name='a b'"),
    ({"name": "hardware"}, "name='hardware'"),
    ({"rows": ROWS | {"x": ["training.deterministic=false"]}}, "training.deterministic applies to a whole process"),
    ({"about": 3}, "about=3"),
    ({"scales": {}}, "scales must be a dictionary"),
    ({"scales": {"a b": []}}, "scales must be a dictionary"),
    ({"scales": {"cpu": "x=1"}}, "scale 'cpu': give a list"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_study_is_one_line(tmp_path, change, message):
    file = write_study(tmp_path, **change)
    with pytest.raises(UserError, match=message) as caught:
        load_study(file)
    assert str(caught.value).startswith(file) and "\n" not in str(caught.value)


def test_rows_may_differ_in_their_folder_of_images_and_flags_are_blamed_for_what_they_make_equal(tmp_path):
    rows = {name: ["data.name=folder", "data.fake=false", f"data.dir=/data/{name}"] for name in ("cats", "dogs")}
    drop = [item for item in TINY if "fake" not in item]
    study = load_study(write_study(tmp_path, rows=rows, baseline="cats", overrides=drop), check=False)
    assert [row.config.data.dir for row in study.rows.values()] == ["/data/cats", "/data/dogs"]
    rows = {"a": ["training.epochs=2"], "b": ["training.epochs=3"]}
    file = write_study(tmp_path, rows=rows, baseline="a", overrides=[o for o in TINY if "training.steps" not in o])
    with pytest.raises(UserError, match="have the same configuration; with these flags: leave them out, or remove one"):
        load_study(file, overrides=["--config.training.steps=5"], check=False)


def test_scales_are_studies_of_their_own(tmp_path):
    scales = {"cpu": [], "gpu": ["training.steps=7"]}
    file = write_study(tmp_path, scales=scales)
    cpu, gpu = load_study(file), load_study(file, scale="gpu")
    assert (cpu.name, gpu.name) == ("made_up_cpu", "made_up_gpu")
    assert (cpu.directory.name, gpu.directory.name) == ("made_up_cpu", "made_up_gpu")
    assert {row.config.training.steps for row in gpu.rows.values()} == {7}
    assert all(row.overrides[-2:-1] != gpu.rows[name].overrides[-2:-1] for name, row in cpu.rows.items())
    named = load_study(write_study(tmp_path, scales=scales, directory="here/runs"), scale="gpu")
    assert named.directory == pathlib.Path("here/runs_gpu")
    other = load_study(file, overrides=["--config.training.steps=9"], scale="gpu")
    assert {row.config.training.steps for row in other.rows.values()} == {9}


def test_a_file_that_is_no_study(tmp_path):
    for name, text, message in (
        ("a.py", "x = 1", "get_study"),
        ("b.py", "def get_study():\n    return 3", "int, not a dictionary"),
        ("c.toml", "rows = [", "TOMLDecodeError"),
        ("d.txt", "", "a Python or a TOML file"),
        ("e.py", "def get_study():\n    return {'config': 'configs/digits.py'}", "'rows' is missing"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            load_study(str(tmp_path / name))
    with pytest.raises(UserError, match=r"no such file; there are: b\.py, e\.py$"):
        load_study(str(tmp_path / "absent.py"))


def test_what_makes_a_run_the_same():
    config = load_config("configs/digits.py")
    slower, other, later = (config.copy_and_resolve_references() for _ in range(3))
    slower.data.num_threads, slower.training.compilation_cache = 7, ""
    other.optimizer.momentum = 0.8
    assert identity(with_seed(config, 3)) == identity(slower) == identity(config) != identity(other)
    assert with_seed(config, 3).seed == 3 and config.seed != 3
    assert changes(config, slower) == []
    assert changes(config, other) == ["optimizer.momentum: 0.9 -> 0.8"]
    with later.unlocked():
        del later.optimizer.clip_norm  # as if the key had come after the run
    assert changes(complete(later), config) == []
    other.optimizer.clip_norm = 1.0
    assert "optimizer.clip_norm: 0.0 -> 1.0" in changes(later, other)


def without_later_keys(config):
    """The configuration as the first version would have written it."""
    old = config.to_dict()
    for key in [key for key, entry in KEYS.items() if entry.before is not ALWAYS]:
        group, name = key.split(".")
        del old[group][name]
    return old


def test_a_study_older_than_many_keys_goes_on_and_is_reported(tmp_path, monkeypatch):
    (tmp_path / "recipe.py").write_text((ROOT / "configs" / "digits.py").read_text())  # no base.py lies beside it
    study = load_study(write_study(tmp_path, config=str(tmp_path / "recipe.py")), str(tmp_path / "runs"), check=False)
    for row in study.rows.values():
        write_text(study.directory / row.name / "row.json", json.dumps(without_later_keys(row.config)))
    check_same_rows(study)
    assert all(row["params"] for row in results.load(study.file, str(study.directory))["rows"])
    checked = []

    def create(config, info):
        check_keys(config)
        checked.append(config)
        raise UserError("enough")

    monkeypatch.setattr("hga_flax.training.experiment.create_experiment", create)
    with pytest.raises(UserError, match=r"^enough$"):  # and not "data.mixup is missing"
        step_times.measure(*results.locate(study.file, str(study.directory)), print)
    assert checked


def test_a_study_that_changed_under_its_folder_is_noticed(tmp_path):
    study = load_study(write_study(tmp_path), str(tmp_path / "runs"))
    begun = study.directory / "se" / "row.json"
    begun.parent.mkdir(parents=True)
    begun.write_text(to_json(study.rows["se"].config))
    check_same_rows(study)
    changed = load_study(write_study(tmp_path, overrides=[*TINY, "optimizer.momentum=0.5"]), str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"row 'se' was started with .* \(optimizer.momentum: 0.9 -> 0.5\)"):
        check_same_rows(changed)
    begun.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        check_same_rows(study)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_is_valid_and_headed_by_its_commands(file):
    name = file.relative_to(ROOT)
    study = load_study(str(name))
    assert f"python -m hga_flax study {name}" in file.read_text()
    assert f"python -m hga_flax report {name}" in file.read_text()
    seeds = {"cifar10_attention": 9, "cifar10_recipe": 1}  # the recipe's rows are one short run each, and say so
    least = seeds.get(file.stem, 5 if file.stem.startswith(("fashion", "table4")) else 3)
    assert study.about and len(study.seeds) >= least


def test_studies_of_one_folder_agree_on_their_rows():
    seen = {}
    for file in SHIPPED:
        study = load_study(str(file.relative_to(ROOT)), check=False)
        for row in study.rows.values():
            known = seen.setdefault((study.directory, row.name), row)
            assert identity(known.config) == identity(row.config), (file, row.name)


@pytest.mark.parametrize("table", TABLES)
def test_the_paper_s_tables_have_the_paper_s_networks(table):
    key = lambda c: network_key(
        c.model.name, c.model.attention, parse_options(c.model.attention_options, "options"), c.data.name
    )
    study = load_study(f"studies/{table}.py", check=False)
    ours = {key(row.config) for row in study.rows.values()}
    assert ours == {network_key(row.model, row.attention, row.options, row.dataset) for row in TABLES[table][1]()}
    assert len(ours) == len(study.rows)


def test_the_small_twins_have_the_rows_of_tables_5_and_6():
    for table, twin in (("table5", "stages"), ("table6", "kernels")):
        options = lambda row: network_key(
            "resnet101",
            row.config.model.attention,
            parse_options(row.config.model.attention_options, "options"),
            "imagenet2012",
        )
        study = load_study(f"studies/fashion_mnist_{twin}.py", check=False)
        paper = {network_key(row.model, row.attention, row.options, row.dataset) for row in TABLES[table][1]()}
        assert {options(row) for row in study.rows.values()} == {key for key in paper if key[0] == "resnet101"}
