"""Augmentation of batches on the device, inside the compiled step.

The random choices for an example depend only on (seed, epoch, index), not on the number of devices and hosts or
the batch size.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def example_keys(root: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """Returns a random key per example, derived from a stream's key and int32 `epoch` `[B]` and `index` `[B]`."""
    fold = lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i)
    return jax.vmap(fold)(epoch, index)


def random_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Pads `[H, W, C]` with zeros on all sides and takes a random H x W crop (He et al. 2016, section 4.2)."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offset = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors `[H, W, C]` horizontally with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def random_rotation(key: jax.Array, image: jax.Array, degrees: float) -> jax.Array:
    """Rotates `[H, W, C]` about its centre by an angle uniform in +- `degrees`: bilinear, zeros outside."""
    height, width, _ = image.shape
    angle = jax.random.uniform(key, minval=-degrees, maxval=degrees) * (jnp.pi / 180)
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    rows = jnp.cos(angle) * y - jnp.sin(angle) * x + (height - 1) / 2
    columns = jnp.sin(angle) * y + jnp.cos(angle) * x + (width - 1) / 2
    rotate = lambda plane: map_coordinates(plane, [rows, columns], order=1, mode="constant")
    return jax.vmap(rotate, in_axes=-1, out_axes=-1)(image)


def augment(
    images: jax.Array, keys: jax.Array, crop_padding: int = 0, *, flip: bool = False, rotation_degrees: float = 0.0
) -> jax.Array:
    """Augments float images `[B, H, W, C]`, each with its own key `[B]`; returns the same shape."""

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        rotate, crop, mirror = jax.random.split(key, 3)
        if rotation_degrees:
            image = random_rotation(rotate, image, rotation_degrees)
        if crop_padding:
            image = random_crop(crop, image, crop_padding)
        return random_flip(mirror, image) if flip else image

    return jax.vmap(one)(keys, images)


def alternating_flip(images: jax.Array, root: jax.Array, epoch: jax.Array, index: jax.Array) -> jax.Array:
    """Mirrors each of `[B, H, W, C]` in every second epoch: the even or the odd ones, chosen at random per image.

    Any two consecutive epochs then show every image both ways; a random flip does that for only half of them (Jordan,
    94 % on CIFAR-10 in 3.29 seconds on a single GPU, https://arxiv.org/abs/2404.00498).

    Args:
        images: float images.
        root: key of a stream; each image's choice derives from it and the image's `index`.
        epoch: int32 `[B]`.
        index: int32 `[B]`, indices of the examples.

    Returns:
        Images `[B, H, W, C]`.
    """
    keys = example_keys(root, jnp.zeros_like(epoch), index)
    mirrored = jax.vmap(jax.random.bernoulli)(keys) ^ (epoch % 2 == 1)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps `[B, H, W, C]` of 0..255 to float32 (x / 255 - mean) / std; mean and std per channel, or one for all."""
    images = images.astype(jnp.float32) / 255
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def _inside(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Returns bool `[size]`, true at the positions start .. start + length - 1."""
    position = jnp.arange(size)
    return (position >= start) & (position < start + length)


def random_erasing(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Fills a random rectangle of `[H, W, C]` with noise, with the given probability.

    Zhong et al., https://arxiv.org/abs/1708.04896. The rectangle has 2 to 33 % of the image's area and an aspect
    ratio of 0.3 to 3.3; sides longer than the image's are clipped.
    """
    height, width, _ = image.shape
    apply, area_key, aspect_key, place, noise = jax.random.split(key, 5)
    area = jax.random.uniform(area_key, minval=ERASED_AREA[0], maxval=ERASED_AREA[1]) * height * width
    low, high = jnp.log(jnp.asarray(ERASED_ASPECT))
    aspect = jnp.exp(jax.random.uniform(aspect_key, minval=low, maxval=high))
    rows = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, height)
    columns = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, width)
    top, left = jnp.floor(jax.random.uniform(place, (2,)) * jnp.stack([height - rows + 1, width - columns + 1]))
    box = _inside(top, rows, height)[:, None] & _inside(left, columns, width)
    values = jnp.floor(jax.random.uniform(noise, image.shape, image.dtype, maxval=256))
    erased = jnp.where(box[..., None], values, image)
    return jnp.where(jax.random.bernoulli(apply, probability), erased, image)


def cutmix_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Returns bool `[H, W]`, true in a box of 1 - `share` of the area, centred at random and clipped at the border."""
    cut = jnp.sqrt(1 - share)
    centre = jax.random.uniform(key, (2,)) * jnp.asarray([height, width])
    half = jnp.asarray([height, width]) * cut / 2
    first, last = jnp.round(centre - half), jnp.round(centre + half)
    return _inside(first[0], last[0] - first[0], height)[:, None] & _inside(first[1], last[1] - first[1], width)


def mix(
    images: jax.Array, labels: jax.Array, keys: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixes each image with its neighbour (0 with 1, 2 with 3, ...), each with its own share.

    mixup (https://arxiv.org/abs/1710.09412) averages the images, CutMix (https://arxiv.org/abs/1905.04899)
    pastes a box of the other one; with both, each is applied to half of the images. Examples come in random
    order, so neighbours are random, and they are on the same device, however many devices there are.

    Args:
        images: `[B, H, W, C]` with B even.
        labels: `[B]`.
        keys: `[B]`.
        mixup: both parameters of the beta distribution of mixup's share; 0: no mixup.
        cutmix: the same for CutMix.

    Returns:
        Images `[B, H, W, C]`, the neighbours' labels `[B]`, and the share of each image's own label, float32 `[B]`.
    """
    neighbour = lambda x: x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)

    def one(key: jax.Array, image: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
        choice, up, cut, place = jax.random.split(key, 4)
        if mixup:
            share = jax.random.beta(up, mixup, mixup)
            added = share * image + (1 - share) * other
        if cutmix:
            box = cutmix_box(place, jax.random.beta(cut, cutmix, cutmix), *image.shape[:2])
            pasted, kept = jnp.where(box[..., None], other, image), 1 - box.mean()
        if mixup and cutmix:
            which = jax.random.bernoulli(choice)
            return jnp.where(which, added, pasted), jnp.where(which, share, kept)
        return (added, share) if mixup else (pasted, kept)

    mixed, shares = jax.vmap(one)(keys, images, neighbour(images))
    return mixed, neighbour(labels), shares
