"""Attentions compared on images of your own: small networks, trained alike, and a table of their errors.

    python -m examples.compare_attentions [--attentions=none,se,hga] [--steps=300] [--seeds=3]
    python -m examples.compare_attentions --data=folder --dir=DIR --eval-split=val --size=32

The first compares on scikit-learn's digits, the second on DIR/{train,val}/CLASS/*.jpg; arrays become
a data set by `python -m hga_flax prepare arrays FILE.npz`. Prints for each attention the parameters,
the mean error over the seeds and the errors themselves: where these overlap, nothing is decided yet.
"""

import argparse

import jax
import numpy as np
import optax

from hga_flax import create_model
from hga_flax.data.host_augmentation import decode, resize
from hga_flax.data.sources import dataset_info, open_source


def load(name: str, directory: str, split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole split: images float32 `[N, size, size, C]` in -1..1 and labels `[N]`."""
    channels, source = dataset_info(name, directory).channels, open_source(name, split, directory)
    records = [source[i] for i in range(len(source))]
    images = np.stack([resize(decode(record["image"], channels), size, size) for record in records])
    return images.astype("float32") / 127.5 - 1, np.array([record["label"] for record in records])


def train(attention: str, x: np.ndarray, y: np.ndarray, classes: int, steps: int, seed: int):
    """Trains one network on images `[N, H, W, C]`; returns its number of parameters and a function images -> labels."""
    model, random = create_model("cifar_resnet8", attention=attention, num_classes=classes), np.random.default_rng(seed)
    variables = model.init(jax.random.key(seed), x[:1])
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05, max(1, steps)), momentum=0.9)
    state = optimizer.init(variables["params"])

    @jax.jit
    def train_step(variables, state, images, labels):
        def loss_fn(params):
            logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        gradient, updates = jax.grad(loss_fn, has_aux=True)(variables["params"])
        change, state = optimizer.update(gradient, state)
        return {"params": optax.apply_updates(variables["params"], change), **updates}, state

    for _ in range(steps):  # with one seed every attention sees the same images in the same order
        rows = random.integers(len(x), size=64)
        variables, state = train_step(variables, state, x[rows], y[rows])
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return size, jax.jit(lambda images: model.apply(variables, images).argmax(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help='"folder", or the name of a prepared data set')
    parser.add_argument("--dir", default="", help="the folder of images, or where prepared data sets lie")
    parser.add_argument("--eval-split", default="test", help="of the images that are not trained on")
    parser.add_argument("--size", type=int, default=8, help="height and width that the images get")
    parser.add_argument("--attentions", default="none,se,hga", help="names of hga_flax.attention_names()")
    parser.add_argument("--steps", type=int, default=300, help="of 64 images")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each attention")
    given = parser.parse_args()

    x, y = load(given.data, given.dir, "train", given.size)
    x_test, y_test = load(given.data, given.dir, given.eval_split, given.size)
    print(f"{len(y):,} images to train on, {len(y_test):,} to test on\n\nattention  parameters  error, %")
    for attention in given.attentions.split(","):
        errors = []
        for seed in range(given.seeds):
            size, predict = train(attention, x, y, int(y.max()) + 1, given.steps, seed)
            labels = np.concatenate([predict(x_test[i : i + 500]) for i in range(0, len(x_test), 500)])
            errors.append(100 * np.mean(labels != y_test))
        print(f"{attention:9}  {size:10,}  {np.mean(errors):8.2f}  ({', '.join(f'{error:.2f}' for error in errors)})")


if __name__ == "__main__":
    main()
