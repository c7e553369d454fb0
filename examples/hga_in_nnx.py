"""Uses HGA in a Flax NNX module and trains it on scikit-learn's handwritten digits with nnx.Optimizer.

    python -m examples.hga_in_nnx [--steps=200] [--attention=hga]

prints the loss during training, the error on unseen digits, and how far the gates (if any) are open for them.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hga_flax import attention_names, create_attention


class Net(nnx.Module):
    """A residual block with an attention: images `[B, 8, 8, 1]` -> logits `[B, 10]`."""

    def __init__(self, attention: str, rngs: nnx.Rngs, channels: int = 16, **options: object):
        self.stem = nnx.Conv(1, channels, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs)
        module = create_attention(attention, channels, **options)  # a Linen module, like HGA(channels)
        self.attention = nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(jnp.ones((1, 8, 8, channels)))
        self.classifier = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False, sow: bool = False) -> jax.Array:
        x = nnx.relu(self.stem(x))
        y = self.norm(self.conv(x), use_running_average=not train)
        mutable = ["batch_stats"] * train + ["intermediates"] * sow  # collections that the attention may write
        x = nnx.relu(x + self.attention(y, train, mutable=mutable))
        return self.classifier(x.mean(axis=(1, 2)))


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Updates parameters and batch statistics in place; returns the loss."""

    def loss_fn(model: nnx.Module) -> jax.Array:
        logits = model(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradient = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradient)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps of 128 digits (default: 200)")
    parser.add_argument("--attention", choices=attention_names(), default="hga", metavar="NAME", help="default: hga")
    arguments = parser.parse_args()

    digits = load_digits()
    images, labels = digits.images[..., None].astype("float32") / 16, digits.target
    x, x_test, y, y_test = train_test_split(images, labels, test_size=297, stratify=labels, random_state=0)
    model = nnx.jit(Net, static_argnums=0)(arguments.attention, nnx.Rngs(0))  # initialises in one compiled function
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)  # batch statistics are not nnx.Param

    random = np.random.default_rng(0)
    for step in range(1, arguments.steps + 1):
        rows = random.integers(len(x), size=128)
        loss = train_step(model, optimizer, x[rows], y[rows])
        if step % 50 == 0 or step == arguments.steps:
            print(f"step {step:4}  loss {loss:.4f}")

    logits = nnx.jit(lambda model: model(x_test, sow=True))(model)  # also stores the sown values in the model
    print(f"error on {len(x_test)} digits: {100 * jnp.mean(logits.argmax(-1) != y_test):.2f} %")
    sown = nnx.to_pure_dict(nnx.pop(model, nnx.Intermediate))  # removes them from the model
    for gate in sown.get("attention", {}).get("gate", ()):  # one array [B, channels] if the attention has gates
        print(f"gates: mean {gate.mean():.3f}, from {gate.min():.3f} to {gate.max():.3f}")


if __name__ == "__main__":
    main()
