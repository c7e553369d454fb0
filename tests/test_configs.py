"""Every shipped configuration loads, is complete and says how it is used; every key is read."""

import io
import pathlib
import re
import tokenize

import pytest

from configs import base
from hga_flax.config.keys import KEYS
from hga_flax.config.loading import apply_recipe, config_keys, configure, get_key, load_config, validate
from hga_flax.models import model_names, model_options
from hga_flax.training.optimizer import create_schedule

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name not in ("__init__.py", "base.py"))
RECIPES = sorted((ROOT / "configs" / "recipes").glob("[!_]*.py"))


def code_only(path):
    """The file without its strings and comments."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = " ".join(t.string for t in tokens if t.type not in (tokenize.STRING, tokenize.COMMENT))
    return code.replace(" . ", ".")


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_a_shipped_configuration_is_valid_and_headed_by_its_command(file):
    config = validate(load_config(str(file)))
    assert config_keys(config) == config_keys(base.get_config())
    assert f"python train.py --config={file.relative_to(ROOT)}" in file.read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_every_configuration_takes_every_recipe(file, recipe):
    name = recipe.stem.replace("_", "-")
    plain, config = load_config(str(file)), validate(configure(str(file), [], name))
    for key in ("model.name", "model.attention", "data.name", "data.augmentation", "data.flip", "seed"):
        assert get_key(config, key) == get_key(plain, key)
    create_schedule(config, steps_per_epoch=100.0, total_steps=round(100 * config.training.epochs))
    assert config.training.steps == 0
    large = plain.data.augmentation == "imagenet"
    assert large or config.data.image_size == plain.data.image_size
    assert large or config.training.batch_size == plain.training.batch_size
    text = recipe.read_text()
    assert f"--recipe={name} --workdir=DIR" in text and "Not run on ImageNet with this code." in text
    # The rest of a configuration decides nothing: a recipe over another one is that recipe.
    for other in RECIPES:
        again = load_config(str(file))
        apply_recipe(again, str(other))
        apply_recipe(again, name)
        differ = [k for k in config_keys(config) if get_key(again, k) != get_key(config, k)]
        # What lies idle, and what the recipes leave to the networks.
        assert set(differ) <= {"model.options", *(key for key, entry in KEYS.items() if entry.effect)}, differ


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_undoes_how_another_file_trains(recipe):
    """Each key that says how to train is set to something else first; what comes out is the recipe all the same."""
    name = recipe.stem.replace("_", "-")
    plain, other = load_config("configs/hga_resnet50.py"), load_config("configs/hga_resnet50.py")
    stays = {"image_size", "mean", "std", "flip", "crop_padding", "eval_crop_fraction", "num_threads", "num_workers",
             "fake_examples", "cache_mb", "max_bad_images", "fake", "name", "dir", "train_split", "eval_split",
             "augmentation", "batch_size", "log_every_steps", "skip_nonfinite", "grace_seconds", "deterministic",
             "lost_process_seconds", "compilation_cache", "cpu_devices"}  # fmt: skip
    changed = 0
    for key in config_keys(plain):
        group, _, last = key.partition(".")
        if group not in ("data", "training", "optimizer", "schedule") or last in stays:
            continue
        value = get_key(plain, key)
        strange = not value if isinstance(value, bool) else ("strange",) if isinstance(value, tuple) else value * 2 or 1
        if last == "decay_at_steps":
            strange = (7,)
        other[group][last] = value + "x" if isinstance(value, str) else type(value)(strange)
        changed += get_key(other, key) != value
    assert changed > 30
    for config in (plain, other):
        apply_recipe(config, name)
    assert [k for k in config_keys(plain) if get_key(other, k) != get_key(plain, k)] == []


def test_the_paper_recipe_over_fine_tuning_freezes_nothing():
    tuned = ["optimizer.freeze=stem*", "training.accumulation_steps=4", "training.freeze_batch_stats=true"]
    assert configure("configs/finetune_folder.py", [f"--config.{x}" for x in tuned]).optimizer.freeze == ("stem*",)
    config = load_config("configs/finetune_folder.py")
    config.optimizer.freeze = ("stem*",)
    config.training.accumulation_steps, config.training.freeze_batch_stats = 4, True
    apply_recipe(config, "paper")
    assert config.optimizer.freeze == config.optimizer.learning_rate_factors == ()
    assert config.training.accumulation_steps == 1 and not config.training.freeze_batch_stats


def test_the_recipes_are_what_their_sources_say():
    file = "configs/hga_resnet50.py"
    paper, plain = configure(file, [], "paper"), load_config(file)
    assert paper == plain  # whose own recipe is the paper's
    a2, a3 = configure(file, [], "modern-300"), configure(file, [], "modern-100")
    for config in (a2, a3):
        assert (config.optimizer.name, config.optimizer.weight_decay, config.training.batch_size) == (
            "lamb",
            0.02,
            2048,
        )
        assert (config.data.mixup, config.data.cutmix, config.training.loss) == (0.1, 1.0, "binary_cross_entropy")
        assert (config.schedule.name, config.schedule.warmup_epochs) == ("cosine", 5.0)
        assert not config.optimizer.decay_norm_and_bias and config.data.eval_crop_fraction == 0.95
    assert (a2.training.epochs, a2.optimizer.learning_rate, a2.data.randaugment_magnitude) == (300, 0.005, 7)
    assert (a3.training.epochs, a3.optimizer.learning_rate, a3.data.randaugment_magnitude) == (100, 0.008, 6)
    assert (a2.data.image_size, a2.evaluation.image_size, a2.model.options) == (224, 0, "stochastic_depth=0.05")
    assert (a3.data.image_size, a3.evaluation.image_size, a3.model.options) == (160, 224, "")
    assert (
        "stochastic_depth" not in configure("configs/hga_googlenet.py", [], "modern-300").model.options
    )  # no residual blocks
    digits = configure("configs/digits.py", [], "modern-300")
    assert digits.optimizer.learning_rate == pytest.approx(0.005 / 4) and digits.training.batch_size == 128


@pytest.mark.parametrize(
    "flag",
    [
        "training.epochs=1",
        "training.epochs=0.1",
        "training.steps=1",
        "training.batch_size=256",
        "model.name=cifar_resnet8",
        "model.name=cifar_preact_resnet110",
        "model.attention=hga",
        "model.dtype=bfloat16",
        "data.name=cifar100",
        "data.train_split=train[:45000]",
        "schedule.name=linear",
        "optimizer.nesterov=false",
    ],
)
def test_cifar10_is_changed_by_one_flag(flag):
    config = validate(configure("configs/cifar10.py", [f"--config.{flag}"]))
    per_epoch = 50_000 / config.training.batch_size
    total = config.training.steps or round(per_epoch * config.training.epochs)
    rate = create_schedule(config, per_epoch, total)
    assert float(rate(total)) == pytest.approx(0.0, abs=1e-6)  # the schedule has come to its end, however long it is
    assert float(rate(int(0.1 * total))) == pytest.approx(config.optimizer.learning_rate)


@pytest.mark.parametrize("name", [*model_names(), "cifar_resnet8"])
def test_a_recipe_sees_the_network_that_a_flag_chooses(name):
    flags = [f"--config.model.name={name}", "--config.model.attention=none"]
    options = configure("configs/hga_resnet50.py", flags, "modern-300").model.options
    assert options == ("stochastic_depth=0.05" if "stochastic_depth" in model_options(name) else "")


@pytest.mark.parametrize("recipe", ["paper", "modern-100", "modern-300"])
def test_data_that_are_not_cropped_keep_their_sizes(recipe):
    config = load_config("configs/digits.py").unlock()
    config.evaluation.image_size = 32
    sizes = lambda: (config.data.image_size, config.training.batch_size, config.evaluation.image_size)
    before = sizes()
    apply_recipe(config, recipe)
    assert sizes() == before


def test_a_recipe_leaves_it_to_training_to_refuse_an_unknown_network():
    assert configure("configs/digits.py", ["--config.model.name=resnet5"], "modern-300").model.options == ""


def test_a_recipe_sees_the_data_that_flags_choose():
    flags = ["--config.data.augmentation=none", "--config.data.image_size=32", "--config.training.batch_size=64"]
    config = configure("configs/hga_resnet50.py", flags, "modern-300")
    assert (config.data.randaugment_ops, config.data.image_size, config.training.batch_size) == (0, 32, 64)


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
