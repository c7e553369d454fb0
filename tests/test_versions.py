"""What one version of Python, JAX and Orbax wrote, another reads; and the project says alike everywhere which it takes.

HGA_FLAX_OTHER_PYTHON names the Python of a second environment that has requirements.txt, such as
.venv-lowest/bin/python; without it the tests that need one are skipped. `.ci/run` sets it.
"""

import hashlib
import os
import re
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as orbax_v1
import pytest

from hga_flax.runs.checkpoints import Checkpoints
from tests.commands import ROOT, environment

OTHER = os.environ.get("HGA_FLAX_OTHER_PYTHON")
NETWORK = ("--config.model.name=cifar_resnet8", "--config.model.options=features=4", "--config.data.image_size=8")
DATA = ("--config.data.fake=true", "--config.data.fake_examples=40", "--config.training.batch_size=16")


def bits(workdir, step):
    """A line for every parameter and batch statistic of a checkpoint: name, type, shape and a digest of the bytes."""
    _, weights = Checkpoints(workdir, read_only=True).restore_weights(step)
    for path, leaf in jax.tree.leaves_with_path(weights):
        digest = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
        yield f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {digest}"


def test_orbaxs_next_interface_reads_a_checkpoint_of_ours(tmp_path):
    values = np.random.RandomState(0).standard_normal((3, 3, 4, 8)).astype(np.float32)
    state = {
        "params": {"stem": {"kernel": jnp.asarray(values)}},
        "batch_stats": {"norm": {"mean": jnp.arange(8.0)}},
        "opt_state": (jnp.asarray(values / 3, jnp.bfloat16), {"count": jnp.int32(7)}),
        "step": jnp.int32(3),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {"examples_seen": 48}, None)
    checkpoints.close()
    read = orbax_v1.load(tmp_path / "checkpoints" / "3", checkpointable_name="state")
    assert sorted(read) == sorted(state)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(read), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(OTHER is None, reason="HGA_FLAX_OTHER_PYTHON names no second environment")
@pytest.mark.parametrize(("writer", "reader"), [(sys.executable, OTHER), (OTHER, sys.executable)], ids=["to", "from"])
def test_a_run_of_one_version_goes_on_with_the_other(tmp_path, writer, reader):
    def run(python, *arguments):
        result = subprocess.run([python, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def train(python, steps):
        plan = (f"--config.training.steps={steps}", f"--workdir={tmp_path}")
        run(python, "train.py", "--config=configs/digits.py", *NETWORK, *DATA, *plan)

    train(writer, 1)
    code = "import pathlib, sys; from tests.test_versions import bits; "
    code += "print(*bits(pathlib.Path(sys.argv[1]), 1), sep='\\n')"
    read = run(reader, "-c", code, str(tmp_path)).splitlines()
    assert read == run(writer, "-c", code, str(tmp_path)).splitlines() and len(read) > 20
    train(reader, 2)  # the optimizer's state too
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert run(writer, "-c", code, str(tmp_path)).splitlines() == read


def test_the_versions_of_python_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [line.rpartition(" ")[2] for line in project["project"]["classifiers"] if "Python :: 3." in line]
    assert named == ["3.11", "3.12", "3.13", "3.14"]
    assert project["project"]["requires-python"] == f">={named[0]}"
    assert project["tool"]["ruff"]["target-version"] == "py" + named[0].replace(".", "")
    assert "sys.version_info >= (3, 11)" in (ROOT / "Makefile").read_text()
    for page in ("README.md", "docs/index.md", "docs/design.md"):
        assert "Python 3.11 to 3.14" in (ROOT / page).read_text(), page
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert sorted(set(re.findall(r'"(3\.\d+)"', workflow))) == [named[0], named[-1]]
    assert f"python{named[-1]}" in (ROOT / ".ci/run").read_text()


def test_the_lowest_version_of_every_requirement_is_named_in_full():
    """`make test-lowest` installs exactly these, so that a bound that does not exist cannot stay."""
    command = re.search(r"sed -E '([^']+)' requirements.txt", (ROOT / "Makefile").read_text())[1]
    result = subprocess.run(["sed", "-E", command, "requirements.txt"], cwd=ROOT, capture_output=True, text=True)
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert len(lines) > 20 and all(re.fullmatch(r"[\w-]+(\[\w+\])?==[\d.]+", line) for line in lines)
    assert "jax==0.10.2" in lines  # the last for Python 3.11
