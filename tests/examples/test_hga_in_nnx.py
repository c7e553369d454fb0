"""The attentions and a network inside Flax NNX, by nnx.bridge.ToNNX: what docs/library.md promises of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.hga_in_nnx import Net, train_step
from hga_flax import attention_names, create_attention, create_model
from tests.commands import ROOT, run

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
LABELS = np.arange(4)


def arrays(model, kind):
    """Copies of a model's variables of a kind, by name."""
    leaves = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): np.array(leaf[...]) for path, leaf in leaves}


def train(model, steps=1):
    """Returns (losses, names of the parameters that moved, names of the statistics that moved)."""
    before = arrays(model, nnx.Param), arrays(model, nnx.BatchStat)
    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    losses = [float(train_step(model, optimizer, IMAGES, LABELS)) for _ in range(steps)]
    after = arrays(model, nnx.Param), arrays(model, nnx.BatchStat)
    return losses, *({n for n in old if (old[n] != new[n]).any()} for old, new in zip(before, after, strict=True))


# One is quick to compile and shows the way; all of them take a minute.
QUICK = "se"
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name != QUICK)) for name in attention_names() if name != "none"]


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_trains_in_an_nnx_module(name):
    options = {"mfe_norm": True} if name == "hga" else {}  # with BatchNorm inside, too
    model = nnx.jit(lambda rngs: Net(name, rngs, channels=16, **options))(nnx.Rngs(0))
    own = {path for path in arrays(model, nnx.Param) if path.startswith("attention/")}
    variables = jax.eval_shape(create_attention(name, 16, **options).init, jax.random.key(0), jnp.ones((1, 8, 8, 16)))
    assert len(own) == len(jax.tree.leaves(variables["params"])) > 0
    statistics = {path for path in arrays(model, nnx.BatchStat) if path.startswith("attention/")}
    assert len(statistics) == len(jax.tree.leaves(variables.get("batch_stats", {})))
    losses, moved, updated = train(model, steps=3)
    assert losses[-1] < losses[0]
    assert own & moved  # the gradient reaches the attention
    assert updated == {"norm/mean", "norm/var"} | statistics
    assert not arrays(model, nnx.Intermediate)  # nothing was sown unasked


def test_it_computes_what_linen_computes_and_sows_where_it_is_asked():
    module = create_attention("hga", 4, mfe_norm=True)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 5, 4)), jnp.float32)
    model = nnx.jit(lambda: nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(x))()
    variables = {
        "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
    }
    both = jax.jit(lambda variables: module.apply(variables, x, True, mutable=["batch_stats", "intermediates"]))
    expected, changed = both(variables)
    out = nnx.jit(lambda model: model(x, True, mutable=["batch_stats", "intermediates"]))(model)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    sown = nnx.to_pure_dict(nnx.pop(model, nnx.Intermediate))
    assert set(sown) == {"cells", "excitation", "gate"}
    np.testing.assert_allclose(sown["gate"][0], changed["intermediates"]["gate"][0], rtol=1e-6, atol=1e-6)
    now = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), now, changed["batch_stats"])


@pytest.mark.slow
def test_a_whole_network_trains():
    linen = create_model("cifar_resnet8", attention="se", num_classes=10, features=4)

    class Wrapped(nnx.Module):
        def __init__(self, rngs):
            self.network = nnx.bridge.ToNNX(linen, rngs=rngs).lazy_init(jnp.ones((1, 8, 8, 1)))

        def __call__(self, x, train=False):
            return self.network(x, train=train, mutable=["batch_stats"] if train else False)

    model = nnx.jit(Wrapped)(nnx.Rngs(0))
    losses, moved, updated = train(model, steps=3)
    assert losses[-1] < losses[0]
    assert any("attention" in path for path in moved) and updated == set(arrays(model, nnx.BatchStat))


@pytest.mark.slow
def test_the_pages_program_runs_and_trains():
    page = (ROOT / "docs" / "library.md").read_text()
    (program,) = re.findall(r"## In Flax NNX.*?```python\n(.*?)```", page, flags=re.DOTALL)
    exec(program, scope := {})
    assert scope["gate"].shape == (2, 64) and 0 < scope["gate"].min() < scope["gate"].max() < 1
    assert not arrays(scope["block"], nnx.Intermediate)  # popped


@pytest.mark.slow
def test_the_example_learns():
    result = run("-m", "examples.hga_in_nnx", "--steps=60")
    assert result.returncode == 0, result.stderr
    assert float(re.findall(r"loss (\S+)", result.stdout)[-1]) < 1.5  # chance: 2.3
    assert float(re.search(r"error on 297 digits: (\S+) %", result.stdout)[1]) < 50  # chance: 90
    mean, low, high = map(float, re.search(r"gates: mean (\S+), from (\S+) to (\S+)", result.stdout).groups())
    assert 0 <= low < mean < high <= 1
