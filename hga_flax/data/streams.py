"""The random streams of a run, derived from its seed by name, so that no two share random numbers.

A name is hashed, and the hash is folded into the seed: on the device into JAX's key, as kauldron's `rngs` do
(https://github.com/google-research/kauldron), on the host into an integer. Adding or removing a stream, or drawing
more from one, does not change the others. Adding the epoch to the seed instead would give seed 0 in epoch 1 the
same numbers as seed 1 in epoch 0.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

PARAMETERS = "parameters"  # initial weights
DROPOUT = "dropout"  # dropout and stochastic depth
AUGMENTATION = "augmentation"  # augmentation of single images, on the device
FLIP = "flip"  # flips that alternate between epochs
ERASING = "erasing"
MIXING = "mixing"  # mixup and CutMix, of pairs
ORDER = "order"  # order of the examples in each epoch
# How an epoch is shuffled. Older runs used Grain's cipher, whose orders of 50,000 examples correlate by up to 0.7.
PERMUTATION, CIPHER = "permutation", "cipher"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def stream(key: Any, name: str) -> Any:
    """Returns the key of a named stream, derived from the run's root key.

    Example:
        stream(jax.random.key(seed), DROPOUT)
    """
    import jax  # imported late: the loader's worker processes do not need it

    return jax.random.fold_in(key, _hash(name))


def host_seed(seed: int, name: str, *numbers: int) -> int:
    """Returns a seed for the host, 0 to 2**32 - 1: a hash of the run's seed, the stream's name and more numbers."""
    return _hash("/".join(map(str, (name, seed, *numbers))))


def epoch_order(seed: int, epoch: int, count: int, shuffled: str = PERMUTATION) -> Callable[[int], int]:
    """Returns a function from a place in an epoch, 0 to count - 1, to the index of the example there.

    Args:
        seed: the run's seed.
        epoch: number of the epoch.
        count: number of examples.
        shuffled: `PERMUTATION`, or `CIPHER` for a run that began with it.
    """
    own = host_seed(seed, ORDER, epoch)
    if shuffled == CIPHER:
        from grain.experimental import index_shuffle  # imported late: only older runs need it

        # Grain's own repeat adds the epoch to the seed, so neighbouring seeds would share their orders.
        return functools.partial(index_shuffle, max_index=count - 1, seed=own, rounds=4)
    # Of NumPy's generators, only RandomState promises the same numbers in every version.
    return np.random.RandomState(own).permutation(count).item
