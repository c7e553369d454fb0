import subprocess
import sys

import pytest

from hga_flax.locks import lock

HOLD = """
import pathlib, sys
from hga_flax.locks import lock
held = lock(pathlib.Path(sys.argv[1]), wait=False)
print(held is not None, flush=True)
sys.stdin.read()
"""


def test_one_process_has_it_until_it_ends_however_that_is(tmp_path):
    file = tmp_path / "new" / "x.lock"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "True\n"
        assert lock(file, wait=False) is None
        other.kill()
        with lock(file, wait=True):  # which comes when the other is gone
            assert other.wait() < 0 and lock(file, wait=False) is None
    with lock(file, wait=False):
        pass


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        lock(tmp_path / "file" / "x.lock", wait=True)
