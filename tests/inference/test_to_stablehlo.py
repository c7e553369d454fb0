import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hga_flax.inference.to_stablehlo import PLATFORMS, load, to_stablehlo

PROGRAM = """
import sys, numpy, jax
from jax import export
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
assert not any(name.startswith(("flax", "hga_flax")) for name in sys.modules)
print(",".join(program.platforms), program.call(numpy.load(sys.argv[2]))["sum"].tolist())
"""


def test_the_program_runs_in_a_process_that_knows_jax_alone(tmp_path):
    weights = np.arange(6, dtype=np.float32).reshape(3, 2)
    function = lambda x: {"sum": (x.astype(jnp.float32) @ weights).sum(axis=-1)}
    (batch,) = jax.export.symbolic_shape("batch")
    program = to_stablehlo(function, jax.ShapeDtypeStruct((batch, 3), jnp.uint8))
    (tmp_path / "program").write_bytes(program)
    for count in (1, 4):
        images = np.arange(3 * count, dtype=np.uint8).reshape(count, 3)
        expected = (images.astype(float) @ weights).sum(axis=-1).tolist()
        assert load(program)(images)["sum"].tolist() == expected
        np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", PROGRAM, tmp_path / "program", tmp_path / "images.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == f"{','.join(PLATFORMS)} {expected}\n", done.stderr
