import numpy as np
import pytest

from benchmarks import loaders
from hga_flax.bench.input import PhotoSource


@pytest.mark.slow
def test_other_loaders_make_the_same_kind_of_batches():
    jpegs = PhotoSource(4).jpegs
    ran = 0
    for package, loader in (("tensorflow", loaders.tf_data), ("torch", loaders.torch_pillow)):
        try:
            __import__(package)
        except ImportError:
            continue
        with loader(jpegs, 64, 10.0, 3, 1) as batches:
            batch = np.asarray(next(batches))
        assert batch.shape == (3, 64, 64, 3) and batch.dtype == np.uint8 and batch.std() > 10
        ran += 1
    if not ran:
        pytest.skip("neither TensorFlow nor torch is installed")
