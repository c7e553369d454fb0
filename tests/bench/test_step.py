import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hga_flax.__main__ import main
from hga_flax.bench.step import make_step, table
from hga_flax.errors import UserError
from hga_flax.models import create_model
from hga_flax.training.optimizer import create_optimizer
from hga_flax.training.state import create_state, make_init
from hga_flax.training.step import make_train_step
from tests.commands import ROOT, environment
from tests.training import tiny

COMMAND = ["bench", "step", "--models=cifar_resnet8:none,cifar_resnet8:se", "--image-size=16", "--batch=4"]
# What a bare GPU machine with JAX, Flax and Optax does not have.
ABSENT = ("tensorflow", "tensorflow_datasets", "grain", "ml_collections", "clu", "cv2", "sklearn", "tensorboardX")


def test_it_runs_where_only_jax_flax_and_optax_are():
    script = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from hga_flax.__main__ import main; "
    script += f"main({[*COMMAND, '--steps=2', '--json']})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["model"], row["attention"]) for row in rows] == [
        ("cifar_resnet8", "none"), ("cifar_resnet8", "se")
    ]  # fmt: skip
    assert rows[0]["ratio_to_first"] == 1 and rows[0]["params"] < rows[1]["params"]
    for row in rows:
        assert 0 < row["fastest_ms"] <= row["step_ms"] and row["compile_s"] > 0
        assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"])
        assert row["flops_per_s"] > 0 and row["peak_memory_bytes"] > 0
        assert row["peak_share"] is None  # nobody publishes a CPU's
    assert "0.0 %" not in table(rows) and "cifar_resnet8" in table(rows)


@pytest.mark.slow
def test_its_step_is_the_trainings():
    c = tiny.config(
        data__augmentation="none", data__crop_padding=0, optimizer__learning_rate=0.1, optimizer__weight_decay=1e-4,
        data__mean=(0.485, 0.456, 0.406), data__std=(0.229, 0.224, 0.225), training__batch_norm_scope="device",
    )  # fmt: skip
    model, batch, mesh = create_model("cifar_resnet8", features=4), tiny.batch(8, 8, 3), tiny.mesh()
    init, step = make_step(model)
    state = init(batch["image"])
    optimizer = create_optimizer(c, optax.constant_schedule(0.1))
    real = create_state(make_init(model, optimizer, (8, 8, 3)), 0, mesh)
    real = real.replace(params=jax.tree.map(jnp.copy, state[0]))
    train = make_train_step(model, optimizer, c, mesh)
    for _ in range(2):  # the second has momentum
        state, loss = jax.jit(step)(state, batch["image"], batch["label"])
        real, report = train(real, batch)
        assert float(loss) == pytest.approx(float(report.loss), rel=1e-5)
    for ours, theirs in ((state[0], real.params), (state[1], real.batch_stats)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models=resnet50"], "'resnet50' is not NETWORK:ATTENTION"),
        (["--models=resnet51:se"], "did you mean 'resnet5"),
        (["--models=resnet50:none,resnet50:sse"], "unknown attention 'sse'"),
        (["--batch=0"], "--batch=0: must be positive"),
        (["--image-size=0"], "--image-size=0"),
        (["--config.seed=1"], "bench takes no configuration"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["bench", "step", *arguments])
