import json
import os
import subprocess
import sys

import numpy as np
import pytest

from hga_flax.__main__ import main
from hga_flax.errors import UserError

FAKE = ["--config=configs/hga_resnet50.py", "--config.data.fake=true", "--config.data.num_threads=1"]


def test_the_loader_is_timed_as_a_subprocess():
    command = [sys.executable, "-m", "hga_flax", "bench", "input", *FAKE, "--json", "--seconds=0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["loader"] == "hga_flax" and row["ratio_to_first"] == 1
    assert row["images_per_s"] > 20 and row["images_per_s_per_core"] > 20
    assert set(row["shares"]) == {"decode", "warp", "batching"}
    assert sum(row["shares"].values()) == pytest.approx(1, abs=0.01)


def test_a_table_of_a_small_data_set(capsys):
    main(["bench", "input", "--config=configs/digits.py", "--seconds=0.1"])
    out = capsys.readouterr().out
    assert "hga_flax" in out and "batching 100%" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py", "--compare"], "needs --config.data.fake=true"),
        (["--config=configs/digits.py", "--config.data.nam=x"], "did you mean 'data.name'"),
        (["--config=configs/none.py"], "no such file"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["bench", "input", *arguments])


def test_a_command_without_a_configuration_refuses_its_keys():
    with pytest.raises(UserError, match="prepare takes no configuration"):
        main(["prepare", "cifar10", "--config.seed=1"])


@pytest.mark.slow
def test_other_loaders_make_the_same_kind_of_batches():
    from hga_flax.data import bench_others
    from hga_flax.data.bench_input import PhotoSource

    jpegs = PhotoSource(4).jpegs
    ran = 0
    for package, loader in (("tensorflow", bench_others.tf_data), ("torch", bench_others.torch_pillow)):
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


def test_cpu_time_counts_the_processes_that_run():
    from hga_flax.data.bench_input import cpu_seconds

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
