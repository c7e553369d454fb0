"""What is done to a batch on the device, inside the compiled step.

The randomness of an example is a function of (seed, epoch, index) alone, so the number of devices,
hosts and the batch size change nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def example_keys(seed: int, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one random key per example from int32 `epoch` `[B]` and `index` `[B]`."""
    root = jax.random.key(seed)
    fold = lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i)
    return jax.vmap(fold)(epoch, index)


def random_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Pads `[H, W, C]` with zeros on all sides and cuts H x W out at random (He et al. 2016, section 4.2)."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offset = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors `[H, W, C]` from left to right with probability one half."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def random_rotation(key: jax.Array, image: jax.Array, degrees: float) -> jax.Array:
    """Rotates `[H, W, C]` about its centre by an angle uniform in +- `degrees`, bilinear, zeros outside."""
    height, width, _ = image.shape
    angle = jax.random.uniform(key, minval=-degrees, maxval=degrees) * (jnp.pi / 180)
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    rows = jnp.cos(angle) * y - jnp.sin(angle) * x + (height - 1) / 2
    columns = jnp.sin(angle) * y + jnp.cos(angle) * x + (width - 1) / 2
    rotate = lambda plane: map_coordinates(plane, [rows, columns], order=1, mode="constant")
    return jax.vmap(rotate, in_axes=-1, out_axes=-1)(image)


def augment(
    images: jax.Array, keys: jax.Array, crop_padding: int = 0, flip: bool = False, rotation_degrees: float = 0.0
) -> jax.Array:
    """Augments float images `[B, H, W, C]` with one key each; returns the same shape."""

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        rotate, crop, mirror = jax.random.split(key, 3)
        if rotation_degrees:
            image = random_rotation(rotate, image, rotation_degrees)
        if crop_padding:
            image = random_crop(crop, image, crop_padding)
        return random_flip(mirror, image) if flip else image

    return jax.vmap(one)(keys, images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8-valued `[B, H, W, C]` -> float32 (x / 255 - mean) / std, mean and std per channel or one for all."""
    images = images.astype(jnp.float32) / 255
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
