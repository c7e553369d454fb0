"""A configuration, batches and a mesh small enough for tests."""

import os

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from configs import base
from hga_flax.config.loading import build_model
from hga_flax.data.sources import open_source
from hga_flax.training.optimizer import create_optimizer
from hga_flax.training.state import create_state, make_init
from hga_flax.training.step import make_train_step
from hga_flax.training.trainer import train

# Compiles in half the time of the network below, for what no attention and no later stage can change.
ONE_BLOCK = {
    "model__name": "resnet18",
    "model__options": "stage_sizes=(1,), features=8",
    "model__attention": "none",
}


def config(**overrides):
    """A small CIFAR-style net on synthetic 8x8 images; `model__name="..."` overrides a key."""
    c = base.get_config()
    with c.unlocked():
        c.model.name, c.model.options, c.model.attention = "cifar_resnet8", "features=4", "hga"
        c.data.name, c.data.fake, c.data.fake_examples = "digits", True, 48
        c.data.image_size, c.data.augmentation, c.data.num_threads = 8, "small", 0
        c.data.mean, c.data.std, c.data.crop_padding = (0.5,), (0.25,), 1
        c.data.eval_split = "test"
        c.training.batch_size, c.training.steps, c.training.log_every_steps = 16, 6, 2
        c.training.compilation_cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
        c.optimizer.learning_rate = 0.05
        c.schedule.name = "constant"
        for key, value in overrides.items():
            group, name = key.split("__") if "__" in key else (None, key)
            (c[group] if group else c)[name] = value
    return c.lock()


def mesh(devices=1):
    return Mesh(np.asarray(jax.devices()[:devices]), ("data",))


def batch(size=16, image_size=8, channels=1, classes=10, seed=0):
    random = np.random.RandomState(seed)
    return {
        "image": random.randint(0, 256, (size, image_size, image_size, channels)).astype(np.uint8),
        "label": random.randint(0, classes, size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
        "epoch": np.zeros(size, np.int32),
    }


def build(c, on, image_shape=(8, 8, 1), classes=10, rate=None):
    """Returns (model, state, train_step) of a configuration on a mesh."""
    axis = "data" if c.training.batch_norm_scope == "global" else None
    model = build_model(c, classes, axis)
    optimizer = create_optimizer(c, optax.constant_schedule(rate or c.optimizer.learning_rate))
    state = create_state(make_init(model, optimizer, image_shape, ema=c.training.ema_decay > 0), c.seed, on)
    return model, state, make_train_step(model, optimizer, c, on)


def train_on_digits(workdir):
    """Trains on the real digits for as long as it takes to be right about some of the 297 held-out ones and no more."""
    train(config(data__fake=False, training__steps=60, training__batch_size=64), str(workdir))


def held_out_digits():
    """Returns the encoded images and the labels that evaluation uses."""
    source = open_source("digits", "test")
    records = [source[i] for i in range(len(source))]
    return [record["image"] for record in records], np.array([record["label"] for record in records])
