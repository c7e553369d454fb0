import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage

from hga_flax.data import device_augmentation as device

IMAGES = np.random.RandomState(0).uniform(0, 255, (6, 9, 7, 2)).astype(np.float32)


def keys(seed=0, epoch=0, index=range(6)):
    index = jnp.asarray(list(index), jnp.int32)
    return device.example_keys(seed, jnp.full_like(index, epoch), index)


def test_keys_differ_by_seed_epoch_and_index_and_by_nothing_else():
    data = {
        (s, e, i): tuple(np.asarray(jax.random.key_data(keys(s, e, [i]))[0]).tolist())
        for s in (0, 1)
        for e in (0, 1)
        for i in (0, 1)
    }
    assert len(set(data.values())) == 8
    alone = jax.random.key_data(keys(0, 0, [4]))[0]
    np.testing.assert_array_equal(alone, jax.random.key_data(keys(0, 0))[4])


def test_a_crop_is_a_window_of_the_padded_image():
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    crops = jax.vmap(lambda k, x: device.random_crop(k, x, 2))(keys(), IMAGES)
    offsets = set()
    for crop, whole in zip(np.asarray(crops), padded, strict=True):
        matches = [(a, b) for a in range(5) for b in range(5) if (whole[a : a + 9, b : b + 7] == crop).all()]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert len(offsets) > 1


def test_flip_mirrors_half():
    many = jnp.broadcast_to(IMAGES[0], (200, 9, 7, 2))
    flipped = jax.vmap(device.random_flip)(keys(index=range(200)), many)
    is_mirror = np.asarray((flipped == IMAGES[0][:, ::-1]).all(axis=(1, 2, 3)))
    is_same = np.asarray((flipped == IMAGES[0]).all(axis=(1, 2, 3)))
    assert (is_mirror ^ is_same).all() and 70 < is_mirror.sum() < 130


def test_rotation_agrees_with_scipy():
    key = keys()[3]
    angle = float(jax.random.uniform(key, minval=-30.0, maxval=30.0))
    ours = np.asarray(device.random_rotation(key, jnp.asarray(IMAGES[3]), 30.0))
    for channel in range(2):
        expected = scipy.ndimage.rotate(IMAGES[3, ..., channel], -angle, reshape=False, order=1, mode="constant")
        inside = (slice(2, -2), slice(2, -2))  # SciPy and JAX fade out differently at the border
        np.testing.assert_allclose(ours[(*inside, channel)], expected[inside], atol=0.05)


def test_augment_does_what_is_asked_and_nothing_else():
    same = device.augment(jnp.asarray(IMAGES), keys())
    np.testing.assert_array_equal(same, IMAGES)
    for options in ({"crop_padding": 1}, {"flip": True}, {"rotation_degrees": 15.0}):
        assert (np.asarray(device.augment(jnp.asarray(IMAGES), keys(), **options)) != IMAGES).any()


def test_the_rest_of_the_batch_changes_nothing():
    whole = device.augment(jnp.asarray(IMAGES), keys(), 2, True, 10.0)
    part = device.augment(jnp.asarray(IMAGES[2:4]), keys(index=[2, 3]), 2, True, 10.0)
    np.testing.assert_allclose(whole[2:4], part, rtol=1e-6)


def test_normalize():
    out = device.normalize(jnp.asarray(IMAGES), (0.5, 0.25), (2.0, 4.0))
    np.testing.assert_allclose(out[..., 1], (IMAGES[..., 1] / 255 - 0.25) / 4, rtol=1e-5, atol=1e-6)
