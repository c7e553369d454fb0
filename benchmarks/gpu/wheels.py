"""Collects the wheels that an offline machine with the packages of `PRESENT` and PyTorch still needs.

    python -m benchmarks.gpu.wheels --out=wheels [--python=3.12] [--limit-mib=60]

Then, on that machine:

    python3 -m pip install --no-index --no-deps --target=site wheels/*.whl && export PYTHONPATH=site
"""

import argparse
import pathlib
import subprocess
import sys

# Of the project's requirements, those that the machine has, and those that benchmarks/gpu does not use.
PRESENT = (
    "jax", "flax", "optax", "orbax-checkpoint", "absl-py", "etils", "fsspec", "numpy", "opencv-python-headless",
    "scikit-learn", "joblib", "scipy", "matplotlib", "rich", "pytest-xdist", "hypothesis",
)  # fmt: skip
UNUSED = ("tensorboard", "ruff", "mypy", "onnx", "onnxruntime", "setuptools", "zensical", "mkdocstrings-python")
# The others, and their dependencies.
NEEDED = (
    "ml_collections>=1.1,<2",
    "clu>=0.0.12,<0.1",
    "grain>=0.2.18,<0.3",
    "array_record",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources>=6.4,<8",
    "dm-tree",
    "immutabledict",
    "promise",
    "simple_parsing",
    "docstring-parser",
    "tensorflow-metadata",
    "toml",
    "simplejpeg>=1.9,<2",
    "tensorboardX>=2.6.5,<3",
    "pytest>=9,<10",
    "portpicker",  # for Grain
    "six",  # for promise
    "termcolor",  # for TFDS
    "googleapis-common-protos",  # for tensorflow-metadata
)
SOURCE = ("promise", "tensorflow-metadata")  # pure Python but sometimes published without a wheel, so built here
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28, 31, 34, 35)))


def commands(python: str, out: pathlib.Path) -> list[list[str]]:
    """Returns two pip commands: one downloads wheels for the other machine, one builds the rest."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    foreign = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    foreign += [f"--platform={platform}" for platform in PLATFORMS]
    fetched = [name for name in NEEDED if name not in SOURCE]
    return [
        [*pip, "download", "--no-deps", f"--dest={out}", *foreign, *fetched],
        [*pip, "wheel", "--no-deps", f"--wheel-dir={out}", *SOURCE],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="wheels", metavar="DIR", help="folder for the wheels (default: wheels)")
    parser.add_argument(
        "--python", default="3.12", metavar="X.Y", help="Python version of the other machine (default: 3.12)"
    )
    parser.add_argument(
        "--limit-mib", type=float, default=60.0, metavar="N", help="largest total size in MiB (default: 60)"
    )
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for command in commands(arguments.python, out):
        if subprocess.run(command, check=False).returncode:
            print("error: pip could not collect the wheels; see its output above", file=sys.stderr)
            return 1
    size = sum(wheel.stat().st_size for wheel in out.glob("*.whl")) / 2**20
    print(f"{len(list(out.glob('*.whl')))} wheels, {size:.1f} MiB, in {out}")
    if size > arguments.limit_mib:
        print(f"error: {size:.1f} MiB is more than {arguments.limit_mib:g} MiB; raise --limit-mib", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
