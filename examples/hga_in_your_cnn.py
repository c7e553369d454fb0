"""Uses HGA in your own CNN and trains it on scikit-learn's handwritten digits with Optax.

    python -m examples.hga_in_your_cnn [--steps=200]

prints the loss during training, the error on unseen digits, and how far the gates of each block are
open for them (0 closed, 1 open).
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hga_flax import HGA


class Net(nn.Module):
    """Two convolutions, each followed by an HGA: images `[B, 8, 8, 1]` -> logits `[B, 10]`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for block, channels in enumerate((16, 48), start=1):
            x = nn.relu(nn.Conv(channels, (3, 3), name=f"conv{block}")(x))
            x = HGA(channels, name=f"hga{block}")(x, train)  # [B, H, W, channels] -> same shape
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10, name="classifier")(x.mean(axis=(1, 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="training steps of 128 digits (default: 200)")
    steps = parser.parse_args().steps

    digits = load_digits()
    images, labels = digits.images[..., None].astype("float32") / 16, digits.target
    x, x_test, y, y_test = train_test_split(images, labels, test_size=297, stratify=labels, random_state=0)
    model, optimizer = Net(), optax.adam(optax.cosine_decay_schedule(1e-2, max(1, steps)))
    params = jax.jit(model.init)(jax.random.key(0), x[:1])
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, images, labels):
        def loss_fn(params):
            logits = model.apply(params, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    random = np.random.default_rng(0)
    for step in range(1, steps + 1):
        rows = random.integers(len(x), size=128)
        params, state, loss = train_step(params, state, x[rows], y[rows])
        if step % 50 == 0 or step == steps:
            print(f"step {step:4}  loss {loss:.4f}")

    logits, sown = jax.jit(lambda *inputs: model.apply(*inputs, mutable=["intermediates"]))(params, x_test)
    print(f"error on {len(x_test)} digits: {100 * jnp.mean(logits.argmax(-1) != y_test):.2f} %")
    for name, block in sown["intermediates"].items():
        (gate,) = block["gate"]  # [B, channels]
        print(f"gates of {name}: mean {gate.mean():.3f}, from {gate.min():.3f} to {gate.max():.3f}")


if __name__ == "__main__":
    main()
