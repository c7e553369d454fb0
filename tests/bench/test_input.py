import json
import os
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest

from configs import base
from hga_flax.bench.input import PHOTO_SIZE, PhotoSource, _shares, cpu_seconds, measure
from hga_flax.images.decoding import decode

FAKE = ["--config=configs/hga_resnet50.py", "--config.data.fake=true", "--config.data.num_threads=1"]


@pytest.mark.medium
def test_the_loader_is_timed_as_a_subprocess():
    command = [sys.executable, "-m", "hga_flax", "bench", "input", *FAKE, "--json", "--seconds=0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["loader"] == "hga_flax" and row["ratio_to_first"] == 1
    assert row["images_per_s"] > 20 and row["images_per_s_per_core"] > 20
    assert set(row["shares"]) == {"read", "decode", "warp", "batching"}
    assert sum(row["shares"].values()) == pytest.approx(1, abs=0.01)


def test_a_measurement_has_at_least_one_batch():
    assert measure(iter(range(9)), 8, 1e-9)[0] > 0


def test_photographs_are_of_imagenets_size_and_differ():
    source = PhotoSource(4)
    pixels = [decode(source[i]["image"], 3) for i in range(4)]
    assert all(p.shape == (PHOTO_SIZE[1], PHOTO_SIZE[0], 3) and p.std() > 10 for p in pixels)
    assert len({p.tobytes() for p in pixels}) == 4
    assert len(source) == 1_281_167 and source[4]["image"] == source[0]["image"]


def test_cpu_time_counts_the_processes_that_run():
    if not os.path.exists("/proc/self/stat"):
        pytest.skip("reads /proc")
    before = cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint('x', flush=True)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child.stdout.read(1)
        assert cpu_seconds() - before >= 0.45
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("augmentation", ["imagenet", "small"])
def test_a_broken_image_is_left_out_of_the_shares(augmentation):
    config = base.get_config()
    config.data.augmentation, config.data.image_size = augmentation, 32
    png = cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    source = [{"image": image, "label": 0} for image in (png, b"broken", png)]
    dataset = types.SimpleNamespace(data=config.data, info=types.SimpleNamespace(channels=3))
    assert sum(_shares(dataset, source, 1.0).values()) == pytest.approx(1, abs=0.01)
