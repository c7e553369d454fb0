import numpy as np

from hga_flax.data.memory import MemorySource, in_memory
from hga_flax.images.bad_images import BadImage


class Numbers:
    """2,500 labelled numbers of which one is broken; with or without reading many at once."""

    def __len__(self):
        return 2500

    def __getitem__(self, index):
        return {"image": index, "label": index % 10}


class Many(Numbers):
    def __getitems__(self, rows):
        return [self[row] for row in rows]


def transform(image, index, epoch):
    if image == 1030:
        raise BadImage("broken")
    return np.full((2, 2, 1), image % 251, np.uint8)


def test_every_example_is_kept_and_a_broken_one_stays_broken():
    for source in (Numbers(), Many()):
        kept = MemorySource(source, transform, (2, 2, 1))
        assert len(kept) == 2500 and kept.original is source
        for index in (0, 1023, 1024, 2499):
            np.testing.assert_array_equal(kept[index]["image"], transform(index, index, 0))
            assert kept[index]["label"] == index % 10
        assert kept[1030]["image"] == b""


def test_only_what_fits_is_kept():
    assert isinstance(in_memory(Numbers(), transform, (2, 2, 1), 0.01), MemorySource)
    source = Numbers()
    assert in_memory(source, transform, (2, 2, 1), 0.0099) is source
