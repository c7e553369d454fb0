"""Compares attentions on your own images: trains a small network with each and prints a table of errors.

    python -m examples.compare_attentions [--attentions=none,se,hga] [--steps=200] [--seeds=3]
    python -m examples.compare_attentions --data=folder --dir=DIR --eval-split=val --size=32

The first command uses scikit-learn's digits, the second DIR/{train,val}/CLASS/*.jpg. The table has the parameters,
the mean error, and the error of each seed: if these overlap, nothing is decided.
"""

import argparse

import jax
import numpy as np
import optax

from hga_flax import attention_names, create_model
from hga_flax.data.sources import dataset_info, open_source
from hga_flax.errors import UserError, nearest, run_main
from hga_flax.images.decoding import decode
from hga_flax.images.host_augmentation import resize


def load(name: str, directory: str, split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole split: images float32 `[N, size, size, C]` from -1 to 1, and labels `[N]`."""
    channels, source = dataset_info(name, directory).channels, open_source(name, split, directory)
    records = [source[i] for i in range(len(source))]
    images = np.stack([resize(decode(record["image"], channels), size, size) for record in records])
    return images.astype("float32") / 127.5 - 1, np.array([record["label"] for record in records])


def compare(attention: str, x, y, x_test, y_test, steps: int, seeds: int) -> tuple[int, list[float]]:
    """Trains a network for each seed; returns the number of parameters and the errors in percent."""
    model = create_model("cifar_resnet8", attention=attention, num_classes=int(y.max()) + 1)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9)

    @jax.jit
    def train_step(variables, state, images, labels):
        def loss_fn(params):
            logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        gradient, updates = jax.grad(loss_fn, has_aux=True)(variables["params"])
        change, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], change), **updates}, state

    predict, errors = jax.jit(lambda variables, images: model.apply(variables, images).argmax(-1)), []
    for seed in range(seeds):
        variables, random = jax.jit(model.init)(jax.random.key(seed), x[:1]), np.random.default_rng(seed)
        state = optimizer.init(variables["params"])
        for _ in range(steps):  # for a given seed, every attention sees the same images in the same order
            rows = random.integers(len(x), size=64)
            variables, state = train_step(variables, state, x[rows], y[rows])
        labels = np.concatenate([predict(variables, x_test[i : i + 500]) for i in range(0, len(x_test), 500)])
        errors.append(100 * np.mean(labels != y_test))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help='"folder" or the name of a prepared data set')
    parser.add_argument("--dir", default="", help="folder of the images or of the prepared data sets")
    parser.add_argument("--eval-split", default="test", help="split to evaluate on")
    parser.add_argument("--size", type=int, default=8, help="height and width of the images in pixels")
    parser.add_argument("--attentions", default="none,se,hga", help="names from hga_flax.attention_names()")
    parser.add_argument("--steps", type=int, default=200, help="training steps of 64 images")
    parser.add_argument("--seeds", type=int, default=3, help="networks per attention")
    given = parser.parse_args()
    if min(given.size, given.steps, given.seeds) < 1:
        raise UserError("--size, --steps and --seeds must be at least 1")
    for name in set(given.attentions.split(",")) - set(known := attention_names()):
        raise UserError(f"--attentions: unknown attention '{name}'{nearest(name, known)}; known: {', '.join(known)}")
    train, test = (load(given.data, given.dir, split, given.size) for split in ("train", given.eval_split))
    print(f"{len(train[1]):,} images to train on, {len(test[1]):,} to test on\n\nattention  parameters  error, %")
    for attention in given.attentions.split(","):
        size, errors = compare(attention, *train, *test, given.steps, given.seeds)
        print(f"{attention:9}  {size:10,}  {np.mean(errors):8.2f}  ({', '.join(f'{error:.2f}' for error in errors)})")


if __name__ == "__main__":
    run_main(main)
