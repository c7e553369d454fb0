import dataclasses

import numpy as np
import pytest

from hga_flax.pictures import style
from hga_flax.pictures.explain_view import draw
from hga_flax.pictures.gates import BlockGates
from hga_flax.pictures.views import View

RANDOM = np.random.RandomState(0)


def view(label, channels=1, stages=2, drive=False, titles=("3 (99 %)", "cat (50 %)\npredicted dog (50 %)")):
    blocks = [
        BlockGates(
            f"stage{stage}", f"stage{stage}_block{block}", RANDOM.rand(2, 4 * stage).astype(np.float32),
            RANDOM.randn(2, 21, 4 * stage).astype(np.float32) if drive else None, (1, 2, 4) if drive else (),
        )
        for stage in range(1, stages + 1)
        for block in (1, 2)
    ]  # fmt: skip
    images = RANDOM.randint(0, 256, (2, 12, 12, channels)).astype(np.uint8)
    return View(label, label, images, list(titles), RANDOM.rand(2, 3, 3).astype(np.float32), blocks)


def figure(*views):
    with style.styled():
        return draw(views, ["a.png", "b.png"])


def arrays(drawn):
    return [np.asarray(image.get_array()) for axes in drawn.axes for image in axes.images]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_maps_and_gates_are_drawn_as_they_are(channels):
    hga = view("hga", channels, drive=True)
    drawn = figure(view("none", channels, stages=0), hga)
    found = arrays(drawn)
    image = hga.images[1] if channels == 3 else hga.images[1, ..., 0]
    grey = image if channels == 1 else image @ np.array([0.299, 0.587, 0.114])
    for expected in (grey, hga.cams[1] / hga.cams[1].max()):
        assert any(array.shape == expected.shape and np.allclose(array, expected) for array in found)
    lines = np.concatenate([block.gate for block in hga.blocks[:2]])  # stage 1: a line for each block and image
    assert any(array.shape == lines.shape and np.allclose(array, lines) for array in found)


def test_the_cells_are_shares_in_their_places():
    hga = view("hga", drive=True)
    meshes = [np.asarray(mesh.get_array()) for axes in figure(hga).axes for mesh in axes.collections]
    assert len(meshes) == 2 * 2 * 3  # stages, images, grids
    assert [mesh.size for mesh in meshes[:3]] == [1, 4, 16]
    np.testing.assert_allclose(sum(mesh.sum() for mesh in meshes[:3]), 1, rtol=1e-5)
    strength = sum(np.abs(block.drive[0]).mean(axis=-1) for block in hga.blocks[:2])
    np.testing.assert_allclose(meshes[2].ravel(), strength[5:] / strength.sum(), rtol=1e-5)


def test_titles_names_and_labels_can_be_read():
    drawn = figure(view("none", stages=0), view("hga", drive=True))
    texts = [text.get_text() for text in drawn.texts]
    for expected in ("a.png", "none", "hga", "3 (99 %)", "cat (50 %)", "stage2", "hga: gates"):
        assert expected in texts
    long = view("none", stages=0, titles=["a very long name of a class (99.5 %)"] * 2)
    cut = next(text.get_text() for text in figure(long).texts if "99.5" in text.get_text())
    assert cut.startswith("a very") and cut.endswith(".. (99.5 %)") and len(cut) <= 21
    other = figure(view("hga", drive=True, titles=["3 (10 %)\npredicted circle (45 %)"] * 2))
    assert {"3 (10 %)", "predicted:", "circle (45 %)"} <= {text.get_text() for text in other.texts}


def test_runs_that_see_different_images_have_their_own_beside_their_maps():
    grey, colour = view("grey", 1, stages=0), view("colour", 3, stages=0)
    found = arrays(figure(grey, colour))
    luminance = colour.images[0] @ np.array([0.299, 0.587, 0.114])
    row = [grey.images[0, ..., 0], grey.images[0, ..., 0], grey.cams[0], colour.images[0], luminance, colour.cams[0]]
    for array, expected in zip(found[1:7], row, strict=True):  # the first is the bar of the colours
        scale = expected.max() if expected.shape == (3, 3) else 1
        np.testing.assert_allclose(array, expected / scale)
    assert len(arrays(figure(grey, dataclasses.replace(colour, images=grey.images)))) == 1 + 2 * 5


@pytest.mark.parametrize(("runs", "images", "across"), [(1, 1, 1), (1, 6, 2), (2, 6, 1)])
def test_without_cells_the_images_fill_the_page(runs, images, across):
    views = [view(f"se{i}", drive=False) for i in range(runs)]
    for i, one in enumerate(views):
        many = {"images": np.resize(views[0].images, (images, 12, 12, 1)), "titles": ["3 (99 %)"] * images}
        views[i] = dataclasses.replace(one, **many, cams=np.resize(one.cams, (images, 3, 3)))
    with style.styled():
        drawn = draw(views, [f"{i}.png" for i in range(images)])
    tiles = [
        axes.get_position() for axes in drawn.axes if len(axes.images) and axes.images[0].get_cmap().name == "gray"
    ]
    assert len(tiles) == images * (1 + runs) and len({round(tile.x0, 3) for tile in tiles}) == across * (1 + runs)
    assert max(tile.x1 for tile in tiles) > 0.95


def test_where_a_share_acts_the_colours_run_from_the_least_factor_to_the_greatest():
    gates = view("se")
    blocks = [block._replace(share=np.full(block.gate.shape[-1:], 0.1, np.float32)) for block in gates.blocks]
    drawn = figure(dataclasses.replace(gates, blocks=blocks))
    least = min(block.factor.min() for block in blocks)
    assert least > 0.9
    assert {"se: gates (share of the attention included)", f"{least:.3f}"} <= {text.get_text() for text in drawn.texts}
    assert any(np.isclose(image.get_clim()[0], least) for axes in drawn.axes for image in axes.images)


@pytest.mark.parametrize("case", ["all", "gates", "shares", "maps", "long names"])
def test_nothing_sticks_out_of_the_page_and_no_text_meets_another(case):
    se = view("se")
    long = ["a very long name of a class (99.5 %)", "no (1 %)\npredicted what fills all of the line (50 %)"]
    shares = [block._replace(share=np.full(block.gate.shape[-1:], 0.1, np.float32)) for block in se.blocks]
    views = {
        "all": [view("none", stages=0), se, view("hga", drive=True)],
        "gates": [se],
        "shares": [dataclasses.replace(se, blocks=shares)],
        "maps": [view("none", stages=0)],
        "long names": [view("none", stages=0, titles=long), view("hga", drive=True, titles=long)],
    }
    with style.styled():
        drawn = draw(views[case], ["a.png", "a_folder/with_a_long_name.png"])
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.texts if text.get_text()]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1
        for other in boxes[:i]:
            assert not (box.x0 < other.x1 and other.x0 < box.x1 and box.y0 < other.y1 and other.y0 < box.y1)
