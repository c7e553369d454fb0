import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from hga_flax.images import device_augmentation as device

IMAGES = np.random.RandomState(0).uniform(0, 255, (6, 9, 7, 2)).astype(np.float32)


def keys(seed=0, epoch=0, index=range(6)):
    index = jnp.asarray(list(index), jnp.int32)
    return device.example_keys(jax.random.key(seed), jnp.full_like(index, epoch), index)


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


def mirrored(epoch, seed=0, index=range(200)):
    many = jnp.broadcast_to(IMAGES[0], (len(index), 9, 7, 2))
    index = jnp.asarray(list(index), jnp.int32)
    out = np.asarray(device.alternating_flip(many, jax.random.key(seed), jnp.full_like(index, epoch), index))
    is_mirror, is_same = (out == IMAGES[0][:, ::-1]).all(axis=(1, 2, 3)), (out == IMAGES[0]).all(axis=(1, 2, 3))
    assert (is_mirror ^ is_same).all()
    return is_mirror


def test_an_alternating_flip_mirrors_each_image_in_every_second_epoch():
    first = mirrored(0)
    assert 70 < first.sum() < 130
    for epoch in range(1, 5):
        np.testing.assert_array_equal(mirrored(epoch), first ^ bool(epoch % 2))
    assert (mirrored(0, seed=1) != first).any()
    np.testing.assert_array_equal(
        mirrored(3, index=[7, 150]), mirrored(3)[[7, 150]]
    )  # the rest of the batch is nothing


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
    whole = device.augment(jnp.asarray(IMAGES), keys(), 2, flip=True, rotation_degrees=10.0)
    part = device.augment(jnp.asarray(IMAGES[2:4]), keys(index=[2, 3]), 2, flip=True, rotation_degrees=10.0)
    np.testing.assert_allclose(whole[2:4], part, rtol=1e-6)


def test_normalize():
    out = device.normalize(jnp.asarray(IMAGES), (0.5, 0.25), (2.0, 4.0))
    np.testing.assert_allclose(out[..., 1], (IMAGES[..., 1] / 255 - 0.25) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.medium
def test_erasing_fills_one_rectangle_of_the_area_asked_for():
    image = np.full((24, 20, 3), -1, np.float32)
    out = np.asarray(jax.vmap(lambda k: device.random_erasing(k, image, 0.5))(keys(index=range(300))))
    erased = (out != -1).any(axis=-1)
    count = 0
    for box in erased[erased.any(axis=(1, 2))]:
        rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert box.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.005 < box.mean() < 0.37  # by rounding; clipped at the border
        count += 1
    assert 110 < count < 190
    values = out[erased]
    assert values.min() >= 0 and values.max() <= 255 and (values == np.floor(values)).all()
    assert abs(values.mean() - 127.5) < 3
    none = jax.vmap(lambda k: device.random_erasing(k, image, 0.0))(keys())
    assert (np.asarray(none) == -1).all()


LABELS = jnp.arange(6)
SWAPPED = [1, 0, 3, 2, 5, 4]


def test_mixup_against_numpy():
    mixed, other, share = map(np.asarray, device.mix(IMAGES, LABELS, keys(), 0.4, 0.0))
    assert other.tolist() == SWAPPED
    s = share[:, None, None, None]
    np.testing.assert_allclose(mixed, s * IMAGES + (1 - s) * IMAGES[SWAPPED], rtol=1e-5)
    assert len(set(share.tolist())) == 6 and (share >= 0).all() and (share <= 1).all()


def test_cutmix_against_numpy():
    rows = 2000
    images = np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None, None, None] % 2, (rows, 9, 7, 1))
    mixed, _, share = map(np.asarray, device.mix(images, jnp.arange(rows), keys(index=range(rows)), 0.0, 1.0))
    pasted = (mixed != images)[..., 0]
    np.testing.assert_allclose(share, 1 - pasted.mean(axis=(1, 2)), atol=1e-6)  # the label goes by the area pasted
    for box in pasted[pasted.any(axis=(1, 2))][:100]:
        y, x = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        assert box.sum() == (y[-1] - y[0] + 1) * (x[-1] - x[0] + 1)

    # The reference draws in the same way, with NumPy's numbers: the distribution of the shares agrees.
    random = np.random.RandomState(0)
    expected = []
    for _ in range(rows):
        cut = np.sqrt(1 - random.beta(1, 1))
        y, x = random.uniform(0, 9), random.uniform(0, 7)
        (y0, y1), (x0, x1) = np.round([y - 4.5 * cut, y + 4.5 * cut]), np.round([x - 3.5 * cut, x + 3.5 * cut])
        expected.append(1 - max(0, min(y1, 9) - max(y0, 0)) * max(0, min(x1, 7) - max(x0, 0)) / 63)
    assert np.quantile(share, [0.1, 0.25, 0.5, 0.75, 0.9]) == approx(np.quantile(expected, [0.1, 0.25, 0.5, 0.75, 0.9]))


def approx(values):
    return pytest.approx(values, abs=0.05)


def test_the_shares_of_mixup_are_beta_distributed():
    rows = 4000
    flat = jnp.zeros((rows, 1, 1, 1))
    for alpha in (0.2, 1.0, 3.0):
        share = np.asarray(device.mix(flat, jnp.arange(rows), keys(index=range(rows)), alpha, 0.0)[2])
        quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
        assert np.quantile(share, quantiles) == approx(scipy.stats.beta(alpha, alpha).ppf(quantiles))


def test_with_both_half_of_the_images_get_each():
    rows = 600
    images = np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None, None, None] % 2, (rows, 9, 7, 1))
    mixed = np.asarray(device.mix(images, jnp.arange(rows), keys(index=range(rows)), 1.0, 1.0)[0])
    by_mixup = ((mixed > 0) & (mixed < 1)).any(axis=(1, 2, 3))
    assert 240 < by_mixup.sum() < 360


@pytest.mark.medium
def test_mixing_does_not_depend_on_the_rest_of_the_batch():
    whole = device.mix(IMAGES, LABELS, keys(), 1.0, 1.0)
    part = device.mix(IMAGES[2:4], LABELS[2:4], keys(index=[2, 3]), 1.0, 1.0)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(a[2:4], b, rtol=1e-6)
